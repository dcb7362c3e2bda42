#!/usr/bin/env bash
# Makes a virtual environment with the CoCas of other projects, which tests marked `peers` compare this project with.
# Its versions are not the project's own: open_clip's generate() needs an old transformers. All that it does not install
# itself, PyTorch and this project above all, it takes from the environment that PYTHON belongs to (`make setup`).
#
#   scripts/make_peers_env.sh DIR [PYTHON]        then:  DIR/bin/python -m pytest -m peers
set -euo pipefail
dir=$(realpath -m "${1:?usage: scripts/make_peers_env.sh DIR [PYTHON]}")
cd "$(dirname "$0")/.."
python=${2:-.venv/bin/python}

"$python" -m venv "$dir"
echo '*' >"$dir/.gitignore"
packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
echo "import site; site.addsitedir('$(packages "$python")')" >"$(packages "$dir/bin/python")/project.pth"
install() { "$dir/bin/python" -m pip install --disable-pip-version-check --no-input --quiet "$@"; }

install transformers==4.49.0 huggingface_hub==0.34.4 tokenizers==0.21.4 regex einops
# Without their dependencies: those would bring another PyTorch. torchvision 0.28 belongs to PyTorch 2.13.
install --no-deps torchvision==0.28.0 timm==1.0.31 open_clip_torch==3.3.0 coca-pytorch==0.1.0 vit-pytorch==1.26.11
install --no-deps efficientnet-lite-pytorch==0.1.0 torchmultimodal-nightly==2024.4.1 iopath==0.1.10 portalocker==4.4.2
