"""Portable weights out of any state: the model's own tensors, bit for bit, read one at a time."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentddae import cli
from latentddae.core.errors import run_command
from latentddae.models import DiTConfig, zoo
from latentddae.training import export, state_reader, states

STEP = 16


@pytest.fixture(scope="module")
def runs(tmp_path_factory, ranks, start) -> dict[str, Path]:
    """The same few steps under every stage, in bf16 where there are masters, on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in (1, 2, 3):
        options = (
            f"engine.zero_stage={stage}",
            "engine.precision=bf16",
            "ema.extra_halflives_images=[50]",
            "save.every_images=32",
            f"total_images={4 * STEP}",
        )
        assert ranks(
            lambda options=options, stage=stage: start(folder / str(stage), *options), 2
        ) == [
            0,
            0,
        ]
    return {path.name: path for path in folder.iterdir()}


def run_export(*arguments: object) -> int:
    return run_command("export", export.main, [str(a) for a in arguments])


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_the_export_is_the_state(stage, runs, tmp_path, content, capsys) -> None:
    """Key set of the model, values of the fp32 masters and their average, buffers bit-equal."""
    assert run_export(runs[stage], "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert f"both weights after 64 images (images-000000000064): {tmp_path / 'out'}" in said
    kept = content(runs[stage])
    for name, kind in (("model", "master"), ("ema", "ema")):
        found = zoo.load(tmp_path / "out", weights=name)  # type: ignore[arg-type]
        fresh = zoo.build(found.model.config)
        file = load_file(tmp_path / "out" / f"{name}.safetensors")
        assert list(file) and file.keys() == fresh.state_dict().keys()
        buffers = dict(fresh.named_buffers())
        for key, value in file.items():
            assert torch.equal(value, buffers[key] if key in buffers else kept[f"{kind} {key}"]), (
                key
            )
        assert found.info["images_seen"] == 64 and found.info["weights"] == name


def test_the_command_gives_what_the_run_itself_exports(runs, tmp_path) -> None:
    assert run_export(runs["1"], "--out", tmp_path / "out") == 0
    for own in sorted((runs["1"] / "export").iterdir()):
        assert (tmp_path / "out" / own.name).read_bytes() == own.read_bytes()


def test_options(runs, tmp_path, content) -> None:
    run = runs["1"]
    assert run_export(run, "--out", tmp_path / "a", "--weights", "ema", "--precision", "bf16") == 0
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "ema.safetensors"]
    half = load_file(tmp_path / "a" / "ema.safetensors")
    for key, value in half.items():
        if key == "pos_embed":  # a buffer stays as it is
            assert value.dtype == torch.float32
        else:
            assert torch.equal(value, content(run)[f"ema {key}"].bfloat16())
    assert run_export(run, "--out", tmp_path / "b", "--state", states.folder_name(32)) == 0
    assert run_export(run, "--out", tmp_path / "c", "--state", "32", "--weights", "model") == 0
    one, other = (load_file(tmp_path / x / "model.safetensors") for x in "bc")
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert zoo.load(tmp_path / "b").info["images_seen"] == 32
    assert run_export(run, "--out", tmp_path / "d", "--halflife", "50") == 0
    state = state_reader.StateReader(states.find(run / "state"))
    faster = load_file(tmp_path / "d" / "ema.safetensors")
    assert torch.equal(
        faster["final_layer.linear.bias"], state.whole("ema-50", "final_layer.linear.bias")
    )
    assert zoo.load(tmp_path / "d").info["ema"]["halflife_images"] == 50


def test_refusals_are_one_line(runs, tmp_path, capsys) -> None:
    for arguments, status, parts in (
        ((tmp_path / "none",), 78, ["not a run folder"]),
        (
            (runs["1"], "--state", "48"),
            78,
            ["images-000000000048", "there are: images-000000000032"],
        ),
        ((runs["1"], "--state", "newest"), 2, ["images-N", "newest"]),
        ((runs["1"], "--halflife", "70"), 78, ["70", "100, 50"]),
    ):
        assert run_export(*arguments, "--out", tmp_path / "out") == status
        (line,) = capsys.readouterr().err.splitlines()
        assert all(part in line for part in parts), line
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shapes: shapes.pop("x_embedder.proj.weight"), "lacks x_embedder.proj.weight"),
        (lambda shapes: shapes.update(extra=[1]), "holds what the model has not: extra"),
        (
            lambda shapes: shapes.update({"blocks.0.attn.qkv.bias": [7]}),
            "another shape of blocks.0",
        ),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(change, message, runs, tmp_path) -> None:
    state = states.find(runs["1"] / "state")
    shapes = dict(state.info["shapes"])
    change(shapes)
    bent = states.State(state.path, {**state.info, "shapes": shapes})
    with pytest.raises(Exception, match=message):
        export.export(bent, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_frozen_parameters_and_buffers_survive(toy, in_ranks, tmp_path) -> None:
    """Bit-equal through bf16 and ZeRO, though no optimizer knows them."""
    frozen = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))

    config = DiTConfig(input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=0)
    table = dict(zoo.build(config).named_buffers())["pos_embed"]

    def save(stage: int) -> list[bool]:
        model = zoo.build(config)
        model.register_parameter("frozen", torch.nn.Parameter(frozen.clone(), requires_grad=False))
        model.register_buffer("count", torch.tensor([3, 4]))
        run = toy.start(stage=stage, precision="bf16", model=model).train(2)
        reader = state_reader.StateReader(run.save(tmp_path / str(stage)))
        kept = reader.non_trainable_state()
        return [
            torch.equal(kept["pos_embed"], table),
            torch.equal(kept["frozen"], frozen),
            kept["count"].tolist() == [3, 4],
        ]

    for stage in (1, 2, 3):
        assert in_ranks(2, lambda stage=stage: save(stage)) == [[True] * 3] * 2


def test_memory_holds_a_parameter_not_the_model(tmp_path) -> None:
    """A model of 256 MB is exported by a process that may grow by half of that."""
    code = """
import sys, resource, torch
from pathlib import Path
from latentddae.core import config, dist, safetensors_stream
from latentddae.models import DiTConfig, zoo

from latentddae.diffusion import OBJECTIVES
from latentddae.data.latents import LatentSpec
from latentddae.training import export, states
folder = Path(sys.argv[1])
model = DiTConfig(hidden_size=512, depth=16, num_heads=8, num_classes=0)
with torch.device("meta"):
    shapes = {n: list(p.shape) for n, p in zoo.build(model).named_parameters()}
    buffers = {n: b.shape for n, b in zoo.build(model).named_buffers()}
size = {n: torch.Size(s).numel() for n, s in shapes.items()}
entries = {
    f"{kind}/0/{n}": safetensors_stream.Entry(
        torch.float32, (size[n],), lambda n=n: torch.zeros(size[n])
    )
    for kind in ("master", "ema") for n in shapes
} | {f"non_trainable/0/{n}": safetensors_stream.entry(torch.zeros(s)) for n, s in buffers.items()}
path = folder / "images-000000000001"
path.mkdir()
safetensors_stream.write(path / "rank-00000-of-00001.safetensors", entries, {})
info = {
    "images": 1, "shapes": shapes, "files": {"rank-00000-of-00001.safetensors": {}},
    "model": config.to_dict(model), "objective": config.to_dict(OBJECTIVES["flow"]()),
    "latents": LatentSpec(
        kind="moments", channels=4, size=32, scaling_factor=1.0, autoencoder="x"
    ).to_dict(),
    "classes": [], "ema_config": {}, "data": {}, "conditional": False, "contract": {"seed": 0},
}
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])
import threading
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch); thread.start()
export.export(states.State(path, info), folder / "out")
done.set(); thread.join()
print(sum(size.values()) * 4 / 1e6, (peak[0] - before) / 1e3)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    model_mb, grown_mb = map(float, done.stdout.split())
    assert model_mb > 200 and grown_mb < 0.25 * model_mb


def test_export_is_a_command_that_needs_no_deepspeed(runs, tmp_path) -> None:
    code = (
        "import sys; from latentddae.cli import run; "
        f"status = run(['export', {str(runs['1'])!r}, '--out', {str(tmp_path / 'out')!r}]); "
        "assert not {'deepspeed', 'diffusers', 'torchvision'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "export" in cli.COMMANDS


def copied(run: Path, target: Path) -> Path:
    return shutil.copytree(run, target)


def test_a_damaged_newest_state_is_not_passed_over_in_silence(runs, tmp_path, capsys) -> None:
    run = copied(runs["1"], tmp_path / "run")
    newest, older = sorted((run / "state").iterdir(), reverse=True)[:2]
    damaged = next(newest.glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert run_export(run, "--out", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert f"({older.name})" in said.out
    assert damaged.name in said.err
    assert f"using an older state, {older.name}" in said.err
    for path in older.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    assert run_export(run, "--out", tmp_path / "other") == 65
    assert damaged.name in capsys.readouterr().err


def test_the_export_of_a_run_at_work_takes_a_complete_state_and_says_which(
    runs, tmp_path, monkeypatch, capsys
) -> None:
    """The run deletes the state while it is read, and has written another one."""
    run = copied(runs["1"], tmp_path / "run")
    newest, older = sorted((run / "state").iterdir(), reverse=True)[:2]
    newest.rename(tmp_path / "later")
    honest, calls = state_reader.StateReader.whole, []

    def whole(self, kind, name):
        calls.append(self.state.path)
        if len(calls) == 2:
            (tmp_path / "later").rename(newest)
            shutil.rmtree(older)
            raise OSError(2, "No such file or directory")
        return honest(self, kind, name)

    monkeypatch.setattr(state_reader.StateReader, "whole", whole)
    assert run_export(run, "--out", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert f"({newest.name})" in said.out
    assert f"{older} was deleted by its run meanwhile" in said.err
    assert zoo.load(tmp_path / "out").info["images_seen"] == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
