"""Every kind of trouble is made, not imagined: the doctor finds it, says what to do,
and leaves with status 1."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from latentddae import doctor
from latentddae.core.errors import run_command
from latentddae.doctor import Finding


def only(findings: Iterator[Finding]) -> Finding:
    (found,) = findings
    return found


def assert_trouble(found: Finding, text: str, level: str = "trouble") -> None:
    assert found.level == level, found
    assert text in found.text
    assert found.remedy


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is searched before the installed packages, here and in child processes."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def install(packages: Path, name: str, version: str, code: str | None = None) -> None:
    info = packages / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if code is not None:
        (packages / f"{name}.py").write_text(code)


def test_a_machine_in_order(tmp_path: Path, capfd) -> None:
    """This one, whatever it is: no trouble, every check speaks."""
    assert run_command("doctor", doctor.main, [str(tmp_path), "--need-gb", "0.01"]) == 0
    out = capfd.readouterr().out
    subjects = {line.split()[1] for line in out.splitlines() if not line.startswith(" ")}
    assert subjects == {
        *("versions", "launcher", "threads", "devices", "precision", "folder"),
        *("compiler", "ranks", "attention", "imports"),
    }
    assert list(tmp_path.iterdir()) == []


def test_the_kernel_that_auto_takes_is_named(capfd, monkeypatch) -> None:
    """For heads as wide as DiT-B's and DiT-XL's; torch's definition is no kernel."""
    found = [str(finding) for finding in doctor.attention_backends()]
    for width in (64, 72):
        (line,) = [line for line in found if "auto is" in line and f"heads of {width}" in line]
        assert line.startswith("ok")
        assert any(f"sdpa in float32, heads of {width}" in other for other in found)
    assert sum("xformers not used here" in line for line in found) == 1
    assert sum("flash not used here" in line for line in found) == 1
    cpu = torch.device("cpu")
    monkeypatch.setattr(doctor, "resolve_precision", lambda *_: "fp32")
    assert "auto is sdpa, torch's flash_attention kernel" in doctor._auto_kernel(72, cpu).text
    monkeypatch.setattr(doctor.attention, "torch_kernel", lambda _: "math")
    assert_trouble(doctor._auto_kernel(72, cpu), "torch's math kernel", level="warning")


def test_status_1_on_trouble(tmp_path: Path, monkeypatch, capfd) -> None:
    trouble = Finding("trouble", "folder", "it is full", "another one")
    monkeypatch.setattr(doctor, "examine", lambda path, need_gb: iter([trouble]))
    assert run_command("doctor", doctor.main, [str(tmp_path)]) == 1
    out, err = capfd.readouterr()
    assert "trouble  folder" in out and "-> another one" in out
    assert err == "latentddae doctor: error: 1 kinds of trouble, see above\n"


def test_a_package_outside_the_bounds(packages: Path) -> None:
    install(packages, "timm", "0.4.12")
    assert_trouble(only(doctor.versions()), "timm 0.4.12 is installed, <2,>=1.0 is needed")


def test_an_optional_package_outside_the_bounds(packages: Path, monkeypatch) -> None:
    wanted = ["xformers>=0.0.35; extra == 'xformers'", "zensical>=99; extra == 'docs'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: wanted)
    install(packages, "xformers", "0.0.1")
    assert_trouble(only(doctor.versions()), "xformers 0.0.1", level="warning")


def test_a_deepspeed_that_does_not_import(packages: Path) -> None:
    install(packages, "deepspeed", "0.19.8", "raise OSError('libcudart.so.11: cannot open')")
    found = list(doctor.imports())
    assert_trouble(found[0], "deepspeed is installed and does not work: OSError: libcudart.so.11")


def test_a_kernel_made_for_another_torch(packages: Path) -> None:
    """xFormers imports all the same and says so in a warning."""
    said = "xFormers can't load C++/CUDA extensions. xFormers was built for PyTorch 2.1"
    (packages / "xformers").mkdir()
    (packages / "xformers" / "__init__.py").touch()
    (packages / "xformers" / "ops.py").write_text(f"import warnings; warnings.warn({said!r})")
    (packages / "deepspeed.py").touch()
    good, bad = doctor.imports()
    assert (good.level, good.text) == ("ok", "deepspeed")
    assert_trouble(bad, "can't load C++/CUDA extensions. xFormers was built for PyTorch 2.1")
    assert "pip uninstall xformers" in bad.remedy


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is needed")
def test_a_gpu_job_that_sees_no_gpu(monkeypatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert_trouble(only(doctor.devices()), "SLURM_GPUS_ON_NODE=8")


def test_ranks_that_cannot_meet(monkeypatch) -> None:
    """An interface that this machine does not have."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere7")
    monkeypatch.setattr(doctor, "MEETING_S", 10.0)
    found = next(doctor.ranks())
    assert_trouble(found, "2 ranks could not add over gloo")
    assert "GLOO_SOCKET_IFNAME" in found.remedy


def test_launcher_variables_that_contradict() -> None:
    assert_trouble(only(doctor.launcher({"RANK": "2", "WORLD_SIZE": "2"})), "rank 2 of 2")
    assert only(doctor.launcher({})).level == "ok"


def test_leftovers_of_a_launcher_break_no_other_check(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert next(doctor.devices()).level == "ok"
    assert next(doctor.ranks()).level == "ok"


def test_more_threads_than_processors() -> None:
    shared = {"LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "12"}
    found = only(doctor.threads(shared, cores=48))
    assert_trouble(found, "8 ranks here x 12 threads on 48 processors", level="warning")
    assert "OMP_NUM_THREADS=6" in found.remedy
    assert only(doctor.threads(shared, cores=96)).level == "ok"
    assert only(doctor.threads({}, cores=4)).level == "ok"


def test_a_step_that_lost_its_processors() -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "12", "OMP_NUM_THREADS": "12"}
    assert_trouble(only(doctor.threads(step, cores=1)), "asked for 12 processors", level="warning")
    assert only(doctor.threads(step, cores=12)).level == "ok"


def test_no_compiler(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_trouble(only(doctor.compiler()), "on PATH", level="warning")


def test_a_compiler_that_fails(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "false")
    assert_trouble(only(doctor.compiler()), "false fails", level="warning")


def test_a_folder_that_cannot_be() -> None:
    assert_trouble(only(doctor.folder(Path(__file__) / "runs")), "cannot be written")


def test_not_enough_room(tmp_path: Path) -> None:
    assert_trouble(only(doctor.folder(tmp_path, need_gb=1e9)), "GB free, 1e+09 are asked for")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte; a plain folder where nobody may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0
    yield place
    if mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_file_system(disk: Path) -> None:
    if os.path.ismount(disk):
        with pytest.raises(OSError, match="No space"), open(disk / "filler", "wb") as file:
            file.write(bytes(2_000_000))
        assert_trouble(only(doctor.folder(disk)), "No space left on device")
    else:
        assert_trouble(only(doctor.folder(disk, need_gb=1e9)), "GB free")


def test_a_read_only_file_system(disk: Path) -> None:
    if os.path.ismount(disk):
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    else:
        disk.chmod(0o500)
    assert_trouble(only(doctor.folder(disk)), "cannot be written")
