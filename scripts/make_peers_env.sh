#!/usr/bin/env bash
# Makes a virtual environment with this project and the CoCas of other projects, which tests marked `peers` compare it
# with. Its versions are not the project's own: open_clip's generate() needs an old transformers.
#
#   scripts/make_peers_env.sh DIR [PYTHON]        then:  DIR/bin/python -m pytest -m peers
set -euo pipefail
dir=$(realpath -m "${1:?usage: scripts/make_peers_env.sh DIR [PYTHON]}")
python=${2:-python3}
cd "$(dirname "$0")/.."

"$python" -m venv "$dir"
echo '*' >"$dir/.gitignore"
install() { "$dir/bin/python" -m pip install --disable-pip-version-check --no-input --quiet "$@"; }

constraints=$dir/constraints.txt
grep -v -E '^(huggingface_hub|tokenizers)==' constraints.txt >"$constraints"
install -c "$constraints" -e ".[pretrained]" pytest pytest-xdist hypothesis \
    transformers==4.49.0 huggingface_hub==0.34.4 tokenizers==0.21.4 regex ftfy einops
# Without their dependencies: those would bring another PyTorch. torchvision 0.28 belongs to PyTorch 2.13.
install --no-deps torchvision==0.28.0 timm==1.0.31 open_clip_torch==3.3.0 coca-pytorch==0.1.0 vit-pytorch==1.26.11
install --no-deps efficientnet-lite-pytorch==0.1.0 torchmultimodal-nightly==2024.4.1 iopath==0.1.10 portalocker==4.4.2
