"""Compiling ahead of time: what is read from a program, and the verb on simulated chips."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from unclip.runtime import flops, hlo, sharding

ROOT = pathlib.Path(__file__).parents[2]

# A loop of 3 (noted) around a loop of 5 (to be read from its condition), 15 runs of the inner body.
PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=4

%fused (a: bf16[8,16], b: bf16[16,4]) -> bf16[8,4] {
  %a = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[16,4]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[8,4]{1,0:T(8,128)} convolution(%a, %b), dim_labels=bf_io->bf
}

%inner_body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %x = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %w = bf16[4,4]{1,0} constant({...})
  %all-gather.1 = bf16[16,4]{1,0} all-gather(%w), channel_id=1, dimensions={0}
  %fusion.1 = bf16[8,4]{1,0} fusion(%x, %all-gather.1), calls=%fused, CYCLES(100)
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%x, %x)
}

%inner_until (q: (s32[], bf16[8,16])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  %q = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  ROOT %lt = pred[] compare(%i, %five), direction=LT
}

%outer_body (p.1: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p.1 = (s32[], bf16[8,16]{1,0}) parameter(0)
  ROOT %while.1 = (s32[], bf16[8,16]) while(%p.1), condition=%inner_until, body=%inner_body
}

%odd (r: (s32[], bf16[8,16])) -> pred[] {
  %r = (s32[], bf16[8,16]{1,0}) parameter(0)
  ROOT %ne = pred[] custom-call(%r), custom_call_target="more"
}

ENTRY %main (p.2: (s32[], bf16[8,16])) -> f32[2,16] {
  %p.2 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %while.2 = (s32[], bf16[8,16]{1,0}) while(%p.2), condition=%odd, body=%outer_body, TRIPS(3)
  %while.3 = (s32[], bf16[8,16]{1,0}) while(%p.2), condition=%odd, body=%odd_body
  %g = f32[8,16]{1,0} copy(%p.2), CYCLES(7)
  %all-reduce-start.1 = (f32[8,16]{1,0}, f32[8,16]{1,0}) all-reduce-start(%g), channel_id=2
  %all-reduce-done.1 = f32[8,16]{1,0} all-reduce-done(%all-reduce-start.1)
  ROOT %reduce-scatter.1 = f32[2,16]{1,0} reduce-scatter(%all-reduce-done.1), channel_id=3
}

%odd_body (s: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  ROOT %s = (s32[], bf16[8,16]{1,0}) parameter(0)
}
"""
CYCLES = r'backend_config={"window_config":{"estimated_cycles":"\1"}}'
PROGRAM = re.sub(r"CYCLES\((\d+)\)", CYCLES, PROGRAM)
PROGRAM = re.sub(r"TRIPS\((\d+)\)", r'backend_config={"known_trip_count":{"n":"\1"}}', PROGRAM)


def test_collectives_count_as_often_as_their_loops_run():
    found = hlo.summarise(PROGRAM)
    assert found.collectives == {
        "all-gather": hlo.Collective(15, 15 * 16 * 4 * 2),  # the gathered array
        "all-reduce": hlo.Collective(1, 8 * 16 * 4),  # start and done are one
        "reduce-scatter": hlo.Collective(1, 8 * 16 * 4),  # the array before it is scattered
    }
    assert found.cycles == 15 * 100 + 7
    assert found.flops == 15 * 2 * 8 * 16 * 4
    assert found.unknown_loops == 1


KERNELS = """HloModule jit_step

%product (a: bf16[8,16], b: bf16[16,4]) -> bf16[8,4] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,4]{1,0} parameter(1)
  ROOT %convolution.1 = bf16[8,4]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

ENTRY %main (a.1: bf16[8,16], b.1: bf16[16,4]) -> bf16[8,4] {
  %a.1 = bf16[8,16]{1,0} parameter(0)
  %b.1 = bf16[16,4]{1,0} parameter(1)
  %copy.1 = bf16[16,4]{1,0} copy(%b.1), CYCLES(900)
  %says.1 = bf16[16,4]{1,0} custom-call(%copy.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"cycles":"600"
}}, metadata={op_name="jit(step)/says"}, backend_config={"cost_estimate":{"flops":"40"}}
  %free.1 = bf16[16,4]{1,0} custom-call(%says.1), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"bytes_accessed":"5000","flops":"16000"}}}
  %other.1 = bf16[16,4]{1,0} custom-call(%free.1), custom_call_target="Sharding"
  ROOT %fusion.1 = bf16[8,4]{1,0} fusion(%a.1, %other.1), calls=%product, metadata={op_name="jit(step)/fc"}, CYCLES(1000)
}
"""  # noqa: E501
KERNELS = re.sub(r"CYCLES\((\d+)\)", CYCLES, KERNELS)


def test_custom_kernels_count_as_they_say_and_come_first():
    """One that says its cycles, of one of two cores; one by the dearer of operations and bytes."""
    found = hlo.summarise(KERNELS, hlo.Chip(flops=100, bytes=10, cores=2))
    product = 2 * 8 * 16 * 4
    assert found.kernels == (
        hlo.Kernel("free.1", "custom", "", 1, 500, 16000),
        hlo.Kernel("says.1", "custom", "jit(step)/says", 1, 300, 40),
        hlo.Kernel("fusion.1", "fusion", "jit(step)/fc", 1, 1000, product),
        hlo.Kernel("copy.1", "copy", "", 1, 900, 0),
    )
    assert found.cycles == 500 + 300 + 1000 + 900
    assert found.flops == 16000 + 40 + product
    unknown = hlo.summarise(KERNELS)
    assert unknown.cycles == 600 + 1900 and unknown.flops == found.flops


def test_kernels_count_as_often_as_their_loops_run():
    fusion, copy = hlo.summarise(PROGRAM).kernels
    assert fusion == hlo.Kernel("fusion.1", "fusion", "", 15, 15 * 100, 15 * 2 * 8 * 16 * 4)
    assert copy == hlo.Kernel("g", "copy", "", 1, 7, 0)


def test_bytes_of_shapes():
    assert hlo.shape_bytes("bf16[2,8]{1,0:T(8,128)(2,1)S(1)}") == [32]
    assert hlo.shape_bytes("(f32[3]{0}, /*index=1*/pred[], (s4[5], f8e4m3fn[4]))") == [12, 1, 3, 4]


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="entry"):
        hlo.parse("HloModule nothing\n")


def test_known_collectives_of_a_compiled_program():
    """Five steps of a scan, each with one sum over all devices."""
    mesh = sharding.make_mesh({"fsdp": -1})
    rows = sharding.batch_sharding(mesh)

    @jax.shard_map(mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"))
    def program(x):
        step = lambda carry, _: (jnp.sin(carry) + jax.lax.psum(carry, "fsdp"), None)
        return jax.lax.scan(step, x, None, length=5)[0]

    x = jax.ShapeDtypeStruct((len(jax.devices()), 16), jnp.float32, sharding=rows)
    found = hlo.summarise(jax.jit(program).lower(x).compile().as_text())
    assert found.collectives == {"all-reduce": hlo.Collective(5, 5 * 16 * 4)}
    assert found.unknown_loops == 0


def test_operations_of_products_and_convolutions():
    """As XLA counts them, but in a loop as often as it runs."""
    given = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)

    def f(x, w, a):
        y = jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y, jax.lax.scan(lambda c, _: (jnp.tanh(c @ a), None), a, None, length=7)[0]

    compiled = jax.jit(f).lower(given(2, 8, 8, 4), given(3, 3, 4, 6), given(32, 32)).compile()
    text = compiled.as_text()
    if "convolution(" not in text or " dot(" not in text:
        pytest.skip("this XLA hides its products in library calls")
    taps = 3 * 4 - 1  # of 4 outputs with 3 taps each one meets the padding
    assert hlo.summarise(text).flops == 2 * (2 * 6 * 4 * taps**2) + 7 * 2 * 32**3


def test_padding_and_dilation_are_no_operations():
    line = (
        "%c = bf16[32,16,9]{2,1,0} convolution(%a, %b), window={size=32 pad=31_31 "
        "rhs_reversal=1}, dim_labels=0bf_0io->0bf"
    )
    shapes = {"a": "bf16[32,16,8]", "b": "bf16[32,8,9]"}
    instruction = hlo.Instruction(
        "c", "bf16[63,16,9]", *line.split(" = ")[1].split(" ", 1)[1].split("(", 1)
    )
    assert hlo._product_flops(instruction, shapes) == 2 * 16 * 9 * 8 * 32 * 32


@pytest.mark.parametrize(
    "kind, clock, memory",
    [
        ("TPU v4", 1.05e9, 32),
        ("TPU v5 lite", 1.5e9, 16),
        ("TPU v5", 1.75e9, 95),
        ("TPU v6 lite", 1.75e9, 32),
    ],
)
def test_chips_as_libtpu_names_them(kind, clock, memory):
    assert flops.chip_clock(kind) == clock
    assert flops.chip_memory(kind) == memory * 2**30
    # A cycle does a power of two multiplications and additions: 128 x 128 units, or 256 x 256.
    assert flops.chip_peak(kind) / clock == pytest.approx(
        2**18 if clock != 1.5e9 else 2**17, rel=1.1
    )
    assert flops.chip_links(kind) > 1e11


def test_unknown_chips_have_no_clock():
    assert flops.chip_clock("cpu") is None and flops.chip_links("cpu") is None


BUFFERS = """BufferAssignment:
allocation 0: size 4096, page 0, thread-local:
 value: <1 copy{0} @0> (size=4096,offset=0): f32[1024]{0}
allocation 1: size 1000, page 0, parameter 0, shape |f32[250]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 20, page 0, parameter 7, shape |f32[5]| at ShapeIndex {}:
allocation 3: size 512, page 0, constant:
allocation 4: size 300, page 0, maybe-live-out:
allocation 5: size 4, page 0, output shape is |(f32[250], f32[75])|, maybe-live-out:
allocation 6: size 70000, color 1, page 0, preallocated-temp:
allocation 7: size 50000, page 0, preallocated-temp:
"""


def test_memory_by_kind_from_the_table_of_buffers():
    """An argument's place that holds a result is an argument; on-chip memory is not HBM."""
    memory = hlo.assigned_bytes(BUFFERS)
    assert memory == {"arguments": 1020, "outputs": 304, "temporaries": 50000}


# ============================================================ the verb

SMALL = {  # one level, one residual block down and two up, kernels just large enough to shard
    "arch.channels": 96,
    "arch.multipliers": (1,),
    "arch.attention": (False,),
    "arch.time_dim": 96,
    "task.image_size": 16,
    "task.crop": 8,
    "task.draw.steps": 3,
    "optim.warmup_steps": 0,
    "total_steps": 2,
    "sample_examples": 6,
}


SCRIPT = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from configs import clip, upsampler
from unclip import errors
from unclip.training import ahead as verb

out = {}
def config(changes, module=upsampler):
    made = module.get_config("emoji")
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    made.update_from_flattened_dict(changes)
    return made
small, fsdp = json.loads(sys.argv[1]), {"mesh.data": 1, "mesh.fsdp": -1, "sharding": "fsdp"}
devices = jax.devices()
wide = small | fsdp | {"batch_size": 64, "arch.remat": "residual=full"}
out["fsdp"] = verb.examine(config(wide), devices, top=3, hbm=2**33)
out["text"] = verb.text(out["fsdp"])
out["one"] = verb.examine(config(small | {"batch_size": 1}), devices[:1], hbm=2**20)
large = {"batch_size": 2048, "arch.dtype": "bfloat16"}
out["temporaries"] = verb.examine(config(small | large), devices[:2], hbm=2**27)
out["sample"] = verb.examine(config(small), devices[:4], step="sample")
out["refused"] = verb._out_of_memory("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: the total "
    "memory required for HLO temporaries (123.50G) exceeds available HBM (95.73G).")
out["used"] = verb._out_of_memory("RESOURCE_EXHAUSTED: Used 512.0M of 16.0M hbm. Exceeded by 496M")
out["silent"] = verb._out_of_memory("RESOURCE_EXHAUSTED: no figures")
for name, call in {
    "clip_sample": lambda: verb.lower(config({}, clip), devices, "sample"),
    "other": lambda: verb._out_of_memory("INVALID_ARGUMENT: No such compile option: 'x'"),
    "rows": lambda: verb.lower(config(small | {"batch_size": 12}), devices),
}.items():
    try:
        call()
    except errors.ConfigError as e:
        out[name] = str(e)
for text in ("v5p:4x4", "v5e:4x4x4", "v5x:2x2", "v6e:3x5", "v4", "v4:2x2x1", "v5e:1x1"):
    try:
        out[text] = list(verb.parse_topology(text).shape)
    except errors.ConfigError as e:
        out[text] = str(e)
print(json.dumps(out))
"""


def run(*arguments, timeout=400):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        },
    )


@pytest.fixture(scope="module")
def found():
    done = run("-c", SCRIPT, json.dumps(SMALL))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_report(found):
    report = found["fsdp"]
    assert set(report) == {
        "stage",
        "preset",
        "step",
        "devices",
        "mesh",
        "rows",
        "parameters",
        "trained_parameters",
        "memory_per_chip",
        "fits",
        "flops",
        "estimated_seconds",
        "communication_seconds",
        "utilisation",
        "collectives",
        "unknown_loops",
        "compile_seconds",
        "kernels",
        "advice",
        "problems",
    }
    assert report["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert report["rows"] == 64 and report["devices"]["count"] == 8
    assert report["fits"] and report["problems"] == []
    assert "--config.arch.remat= in place of residual=full" in report["advice"][0]
    assert len(report["kernels"]) == 3 and report["kernels"][0]["flops"] > 0
    assert report["kernels"][0]["seconds"] is None  # a CPU's clock is not known
    assert 0.5 < report["flops"]["compiled"] / report["flops"]["model"] < 2
    assert set(report["compile_seconds"]) == {"trace", "wall", "cpu"}
    for word in ("all-gather", "utilisation", "temporaries", "upsampler, preset emoji, train step"):
        assert word in found["text"]


@pytest.mark.slow
def test_sharded_parameters_are_gathered_and_one_device_is_silent(found):
    sharded, one = found["fsdp"], found["one"]
    assert sharded["collectives"]["all-gather"]["bytes"] > 0
    assert one["collectives"] == {}
    assert one["parameters"] == sharded["parameters"]
    # Parameters, average and two moments lie on eight devices, but for small and odd ones.
    assert one["memory_per_chip"]["arguments"] > 4 * 4 * one["parameters"]
    assert sharded["memory_per_chip"]["arguments"] < 0.5 * one["memory_per_chip"]["arguments"]


@pytest.mark.slow
def test_what_does_not_fit_names_the_setting(found):
    assert found["one"]["fits"] is False
    (problem,) = found["one"]["problems"]
    assert "arguments" in problem and "--config.mesh.fsdp=-1" in problem
    assert found["temporaries"]["fits"] is False
    (problem,) = found["temporaries"]["problems"]
    assert problem.startswith("does not fit: a chip needs")
    assert "--config.arch.remat=nothing_saveable" in problem


@pytest.mark.slow
def test_the_compilers_refusals(found):
    assert found["refused"] == int(123.5 * 2**30) and found["used"] == 2**29
    assert found["silent"] is None
    assert "No such compile option" in found["other"]


@pytest.mark.slow
def test_the_sampler(found):
    report = found["sample"]
    assert report["rows"] == 8  # six do not divide over four devices
    assert report["step"] == "sample" and report["flops"]["compiled"] > 0
    assert "draws nothing" in found["clip_sample"]


@pytest.mark.slow
def test_a_batch_that_does_not_divide(found):
    assert "batch_size 12 is not a multiple of 8 (data 8 x fsdp 1 x accumulate 1)" in found["rows"]


@pytest.mark.slow
def test_topologies(found):
    assert found["v4:2x2x1"] == [2, 2, 1] and found["v5e:1x1"] == [1, 1]
    assert "did you mean 'v5p:4x4x2'" in found["v5p:4x4"]
    assert "did you mean 'v5e:4x4'" in found["v5e:4x4x4"]
    assert "'v5e' or 'v5p'" in found["v5x:2x2"] or "'v5p' or 'v5e'" in found["v5x:2x2"]
    assert "did you mean 'v6e:2x4'" in found["v6e:3x5"]
    assert "did you mean 'v4:2x2x2'" in found["v4"]


def test_a_bad_topology_is_one_line_and_exit_code_78():
    done = run("-m", "unclip", "compile", "--config=configs/clip.py:emoji", "--topology=v5p:4x4")
    assert done.returncode == 78
    assert done.stderr.strip().splitlines()[-1].startswith("unclip compile: topology 'v5p:4x4'")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_strict_exits_with_78_when_it_does_not_fit():
    small = [f"--config.{name}={value}" for name, value in SMALL.items()]
    done = run(
        "-m",
        "unclip",
        "compile",
        "--config=configs/upsampler.py:emoji",
        "--devices=2",
        "--strict",
        "--json",
        "--hbm_gib=0.001",
        "--step=sample",
        *small,
    )
    assert done.returncode == 78, done.stderr
    report = json.loads(done.stdout)
    assert report["topology"] is None and report["devices"]["count"] == 2
    assert report["fits"] is False and report["problems"]


def test_the_tpu_compiler(tmp_path):
    pytest.importorskip("libtpu")
    small = {
        "arch.fold": True,
        "optim.warmup_steps": 0,
        "total_steps": 2,
        "arch.image_size": 16,
        "arch.context": 8,
        "arch.vision_width": 64,
        "arch.text_width": 64,
        "arch.vision_layers": 1,
        "arch.text_layers": 1,
        "arch.vocab_size": 64,
        "arch.embed_dim": 32,
        "batch_size": 8,
        "mesh.data": 1,
        "mesh.fsdp": -1,
    }
    small = [f"--config.{name}={value}" for name, value in small.items()]
    command = [
        "-m",
        "unclip",
        "compile",
        "--config=configs/clip.py:emoji",
        "--topology=v5e:2x2",
        "--json",
        "--config.sharding=fsdp",
        *small,
    ]
    done = run(*command, f"--hlo={tmp_path / 'step.txt'}")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["devices"] == {"count": 4, "kind": "TPU v5 lite", "memory_bytes": 16 * 2**30}
    assert report["fits"] and report["estimated_seconds"] > 0 and report["unknown_loops"] == 0
    assert 0 < report["utilisation"] < 1
    assert report["collectives"]["all-reduce"]["count"] > 0
    assert (tmp_path / "step.txt").read_text().startswith("HloModule")
    done = run(*command, "--quick")
    assert done.returncode == 0, done.stderr
    quick = json.loads(done.stdout)
    assert quick["estimated_seconds"] is None and "code" not in quick["memory_per_chip"]
    assert quick["flops"] == report["flops"] and quick["collectives"] == report["collectives"]
    for kind, size in quick["memory_per_chip"].items():
        if kind != "total":
            assert size == pytest.approx(report["memory_per_chip"][kind], rel=0.02, abs=8192), kind


def test_libtpu_is_asked_for_by_name():
    if importlib.util.find_spec("libtpu"):
        hide = "import sys; sys.modules['libtpu'] = None; "
    else:
        hide = ""
    done = run(
        "-c",
        hide + "from unclip.training import ahead as c\n"
        "try: c.topology_devices(c.parse_topology('v5e:2x2'))\n"
        "except c.errors.ConfigError as e: print(e)",
    )
    assert "pip install libtpu" in done.stdout, done.stderr
