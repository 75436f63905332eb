#!/usr/bin/env bash
# What a GPU machine without a network lacks beside its own PyTorch: the wheels of this package's dependencies, in the
# versions that are installed here, into a folder.
#
#   tests/gpu/pack_wheels.sh FOLDER [PYTHON_VERSION]
#   tests/gpu/pack_wheels.sh --list                    their names and versions only
#
# There: python3 -m pip install --no-index --no-deps --target SITE FOLDER/*.whl; export PYTHONPATH=SITE:$PWD
# torch, torchvision, triton and NVIDIA's libraries are left to that machine. DeepSpeed is pure Python and needs no nvcc.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
out=$1 version=${2:-3.12}
python=${PYTHON:-.venv/bin/python}
names=$("$python" - <<'END'
import re
import tomllib
from importlib import metadata
from packaging.requirements import Requirement

theirs = re.compile(r"torch|torchvision|triton|nvidia-.*|cuda-.*|deepspeed")
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
waiting = [*project["dependencies"], *extras["demo"], "pytest", "pytest-timeout"]
seen = {}
while waiting:
    requirement = Requirement(waiting.pop())
    name = re.sub(r"[-_.]+", "-", requirement.name).lower()
    if name in seen or theirs.fullmatch(name):
        continue
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        continue
    seen[name] = metadata.version(name)
    waiting += metadata.requires(name) or []
print("\n".join(f"{name}=={version}" for name, version in sorted(seen.items())))
print("deepspeed==" + metadata.version("deepspeed"))
END
)
[ "$out" != --list ] || { echo "$names"; exit 0; }
mkdir -p "$out"
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
for requirement in $names; do
    if [[ $requirement == deepspeed==* ]]; then
        DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$python" -m pip wheel -q --no-deps -w "$out" "$requirement"
    else
        "$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version "$version" \
            "${platforms[@]}" -d "$out" "$requirement" ||
            "$python" -m pip wheel -q --no-deps -w "$out" "$requirement" # no wheel on the index: pure Python, from source
    fi
done
du -sh "$out"
