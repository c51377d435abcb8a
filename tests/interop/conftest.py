"""Torch files for tests, written without torch."""

import pickle
import zipfile

import numpy as np
import pytest

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage"}


@pytest.fixture
def save_torch():
    """save_torch(path, tree): what torch.save writes of dicts, plain values and arrays."""

    def save(path, tree):
        storages = []

        def plain(value):
            return pickle.dumps(value, 2)[2:-1]

        def push(value):
            if isinstance(value, dict):
                return b"}(" + b"".join(plain(k) + push(v) for k, v in value.items()) + b"u"
            if not isinstance(value, np.ndarray):
                return plain(value)
            key, kind = str(len(storages)), STORAGES[value.dtype.name]
            storages.append(value)
            strides = tuple(step // value.itemsize for step in np.array(value, order="C").strides)
            place = plain("storage") + f"ctorch\n{kind}\n".encode() + plain(key) + plain("cpu")
            body = b"(" + place + plain(value.size) + b"tQ" + plain(0) + plain(value.shape)
            body += plain(strides) + plain(False) + b"ccollections\nOrderedDict\n)R"
            return b"ctorch._utils\n_rebuild_tensor_v2\n(" + body + b"tR"

        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02" + push(tree) + b".")
            for number, array in enumerate(storages):
                archive.writestr(f"archive/data/{number}", np.ascontiguousarray(array).tobytes())
        return path

    return save
