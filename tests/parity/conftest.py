"""The table of `make parity`: what each check measured against which library, and its bound."""

import importlib.metadata
import importlib.util
import os

import pytest

# Numbers are compared as users compute them, but for what asks for `quick_compiles`.
flags = os.environ.pop("XLA_FLAGS").replace("--xla_cpu_use_fusion_emitters=false", "").strip()
if flags:  # XLA takes a blank for the name of a file of flags, and ends the process without it
    os.environ["XLA_FLAGS"] = flags

PEERS = ("torch", "diffusers", "transformers", "open_clip_torch")

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)  # its threads and JAX's would wait for one another


@pytest.fixture
def parity(request):
    """parity(part, against, difference, bound): asserts the bound and keeps the row."""

    def record(part, against, difference, bound):
        difference = float(difference)
        request.node.user_properties.append(("parity", [part, against, difference, bound]))
        assert difference <= bound, f"{part} against {against}: {difference:.3g} > {bound:g}"

    return record


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """FID's Inception with random weights, as the file that the tools share."""
    from tests.parity import peers

    return peers.random_inception(tmp_path_factory.mktemp("inception"))


def pytest_terminal_summary(terminalreporter):
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    reports = [r for r in reports if getattr(r, "when", None) == "call"]
    rows = [
        value
        for report in sorted(reports, key=lambda report: report.nodeid)  # workers mix them
        for name, value in report.user_properties
        if name == "parity"
    ]
    if not rows:
        return
    versions = []
    for name in PEERS:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    write = terminalreporter.write_line
    write("")
    write(f"Parity with {', '.join(versions)}; float32 on CPU unless named otherwise.")
    write("")
    write("| part | against | difference | bound |")
    write("|---|---|---|---|")
    for part, against, difference, bound in rows:
        write(f"| {part} | {against} | {difference:.2g} | {bound:g} |")
