#!/usr/bin/env bash
# Install collected wheels on a host without a network.
# usage: .ci/offline/install.sh WHEELS SITE     (PYTHON names the interpreter, default: python3)
set -euo pipefail
wheels=${1:?usage: install.sh WHEELS SITE} site=${2:?usage: install.sh WHEELS SITE}
python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1
[ ! -e "$site" ] || { echo "install: $site exists: name a new folder" >&2; exit 1; }
compgen -G "$wheels/*.whl" >/dev/null || { echo "install: $wheels has no wheels" >&2; exit 1; }

trap 'rm -rf "$site"' ERR
"$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
# once, or else every process of a test run compiles; packages may contain templates that are no Python
"$python" -m compileall -q -j 0 "$site" >/dev/null || true

# what the host's packages and the wheels miss together, without what the host's miss alone
site=$(cd "$site" && pwd)
before=$("$python" -m pip check || true)
after=$(PYTHONPATH=$site "$python" -m pip check || true)
unmet=$(comm -13 <(sort <<<"$before") <(sort <<<"$after") | sed '/^No broken requirements/d')
[ -z "$unmet" ] || printf 'install: requirements that are not met:\n%s\n' "$unmet" >&2
echo "export PYTHONPATH=$site:."
