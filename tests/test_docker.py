"""Containers and pods: what starts, as whom, where it may write, and how it ends. No container engine is needed.

The slow test runs the images' entry command as they would: as their user, on a read-only tree, in a network that leads
nowhere, ended by SIGTERM in the middle of an answer.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import recipes
import yaml
from planted_text import build_prompt
from recipes import ROOT
from test_doctor import Machine, faults, row
from tiny_checkpoint import write_planted

import vllm_dsa
from vllm_dsa import compat

DOCKER = ROOT / "docker"
IMAGES = (DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu")
ENTRYPOINT = DOCKER / "entrypoint.sh"
USER = 2000
SERVICE = yaml.safe_load(recipes.COMPOSE.read_text())["services"]["vllm"]
PODS = {(file.name, role): pod for file in recipes.MANIFESTS for role, pod in recipes.pods(file).items()}
TIMEOUT = "--shutdown-timeout="
KEY = "not-a-secret-27"
SMALL = ["--dtype=float32", "--max-model-len=4096", "--max-num-batched-tokens=512", "--enforce-eager"]


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, what follows) of a Dockerfile, comments left out and lines joined."""
    text = re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


# Images


def test_the_image_is_of_a_vllm_that_this_package_supports():
    text = IMAGES[0].read_text()
    (version,) = re.findall(r"^ARG VLLM_VERSION=(\S+)$", text, re.MULTILINE)
    assert compat.is_supported(version) and "FROM vllm/vllm-openai:v${VLLM_VERSION}" in text
    setup = (ROOT / "scripts" / "setup.sh").read_text()
    torch = re.search(r"^torch=(\S+)$", setup, re.MULTILINE)[1]
    assert torch in IMAGES[1].read_text()
    for name in (*IMAGES, recipes.COMPOSE):
        for tag in re.findall(r"vllm-dsa:([\d.]+)", name.read_text()):
            assert tag == vllm_dsa.__version__, name


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.name)
def test_an_image_checks_itself_and_serves_as_its_user(file):
    steps = instructions(file)
    last = dict(steps)
    assert any(word == "RUN" and "vllm-dsa doctor" in rest for word, rest in steps)
    assert last["USER"] == f"{USER}:{USER}"
    assert last["ENTRYPOINT"] == '["/usr/local/bin/vllm-dsa-entrypoint"]'
    assert ("COPY", "--chmod=755 docker/entrypoint.sh /usr/local/bin/vllm-dsa-entrypoint") in steps
    settings = dict(re.findall(r"(\w+)=(\S+)", last["ENV"]))
    assert settings["HOME"] == last["WORKDIR"] == "/cache" and settings["VLLM_DSA_REQUIRED"] == "1"
    assert "/health" in last["HEALTHCHECK"]


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.name)
def test_all_that_an_image_copies_is_sent_to_its_build(file):
    sent = {line[1:] for line in Path(f"{file}.dockerignore").read_text().splitlines() if line.startswith("!")}
    for word, rest in instructions(file):
        if word == "COPY" and "--from" not in rest:
            for source in [part for part in rest.split() if not part.startswith("--")][:-1]:
                assert source in sent and (ROOT / source).exists()


def test_doctor_can_be_asked_as_if_a_gpu_were_here(tmp_path):
    """In the image's build is vLLM's build for GPUs, and no GPU: a fault, but not as on an H200."""
    made = Machine(tmp_path)
    made.nvidia_smi("exit 9")
    assert "NVIDIA: none" in faults(made.report(status=1))
    report = made.report("--capability", "9.0", status=0)
    assert report["providers"] == {"write": "vendor", "select": "vendor", "attend": "vendor"}
    assert row(report, "assumed")[0] == "note"
    assert "compute capability 8.0 or newer" in str(made.report("--capability", "7.5", status=1)["checks"])
    (made.site / "vllm" / "_flashmla_C.abi3.so").unlink()
    assert made.report("--capability", "9.0", status=0)["providers"]["attend"] == "triton"
    for wrong in ("9", "90", "sm90"):
        done = made.doctor("--capability", wrong)
        assert done.returncode == 2 and f"--capability {wrong}: pass it as" in done.stderr


# The entry command


def entry(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The entry command with a `vllm` that says how it was called."""
    fake = tmp_path / "vllm"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "key: ${VLLM_API_KEY-none}"\n')
    fake.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | environment
    return subprocess.run([ENTRYPOINT, *arguments], env=env, capture_output=True, text=True, timeout=20)


def test_the_key_comes_from_a_file_and_is_on_no_command_line(tmp_path):
    key = tmp_path / "key"
    key.write_text("s3cret words\n")
    done = entry(tmp_path, "/model", "--port", "1", API_KEY_FILE=str(key))
    assert done.stdout.splitlines() == ["serve", "/model", "--port", "1", "key: s3cret words"]
    assert entry(tmp_path, "/model").stdout.splitlines()[-1] == "key: none"
    assert entry(tmp_path, "/model", VLLM_API_KEY="given").stdout.splitlines()[-1] == "key: given"


@pytest.mark.parametrize("text", [None, ""])
def test_without_the_key_that_was_asked_for_nothing_starts(tmp_path, text):
    key = tmp_path / "key"
    if text is not None:
        key.write_text(text)
    done = entry(tmp_path, "/model", API_KEY_FILE=str(key))
    assert done.returncode == 1 and done.stdout == ""
    assert re.search(r"API_KEY_FILE=\S+key is missing, empty or not readable by user \d+\. Write a key", done.stderr)


# compose.yaml


def test_the_service_is_locked_in():
    assert SERVICE["user"] == f"{USER}:{USER}" and SERVICE["read_only"] is True
    assert SERVICE["cap_drop"] == ["ALL"] and SERVICE["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in SERVICE["ports"])
    writable = [v for v in SERVICE["volumes"] if not (isinstance(v, dict) and v["read_only"])]
    assert writable == ["cache:/cache"] and [mount.partition(":")[0] for mount in SERVICE["tmpfs"]] == ["/tmp"]
    secrets = yaml.safe_load(recipes.COMPOSE.read_text())["secrets"]
    assert SERVICE["environment"]["API_KEY_FILE"] == f"/run/secrets/{SERVICE['secrets'][0]}"
    ignored = subprocess.run(["git", "check-ignore", "-q", str(DOCKER / secrets["api_key"]["file"])], cwd=ROOT)
    assert ignored.returncode == 0, "the key would be committed"


def test_the_service_has_what_eight_ranks_need_and_the_time_to_end():
    (device,) = SERVICE["deploy"]["resources"]["reservations"]["devices"]
    assert f"--tensor-parallel-size={device['count']}" in SERVICE["command"]
    assert SERVICE["shm_size"] == "32gb" and SERVICE["ulimits"]["memlock"] == -1
    assert seconds(SERVICE["stop_grace_period"]) >= shutdown_timeout(SERVICE["command"]) + 30
    assert "/health" in SERVICE["healthcheck"]["test"][-1]


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def shutdown_timeout(command: list[str]) -> int:
    (value,) = (word.removeprefix(TIMEOUT) for word in command if word.startswith(TIMEOUT))
    return int(value)


# Kubernetes


def container(pod: dict) -> dict:
    return pod["spec"]["containers"][0]


def waits_before_sigterm(pod: dict) -> int:
    sleep, value = container(pod)["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    return int(value)


@pytest.mark.parametrize("which", PODS, ids=" ".join)
def test_pods_are_locked_in(which):
    pod, inside = PODS[which]["spec"], container(PODS[which])
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert {pod["securityContext"][key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {USER}
    rights = inside["securityContext"]
    assert rights["readOnlyRootFilesystem"] is True and rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"]["drop"] == ["ALL"]
    writable = {mount["mountPath"] for mount in inside["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/cache", "/tmp", "/dev/shm"}
    assert {mount["name"] for mount in inside["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (key,) = [e["value"] for e in inside["env"] if e["name"] == "API_KEY_FILE"]
    (secret,) = [mount["mountPath"] for mount in inside["volumeMounts"] if mount["name"] == "api-key"]
    assert Path(key).parent == Path(secret)
    assert inside["resources"]["limits"]["nvidia.com/gpu"] == "8"


@pytest.mark.parametrize("which", [which for which in PODS if which[1] != "worker"], ids=" ".join)
def test_answers_are_finished_before_a_pod_ends(which):
    pod, inside = PODS[which], container(PODS[which])
    needed = waits_before_sigterm(pod) + shutdown_timeout(inside["args"])
    assert pod["spec"]["terminationGracePeriodSeconds"] >= needed + 30
    assert waits_before_sigterm(pod) >= 10


def test_a_worker_outlives_its_leader():
    leader, worker = PODS["multi-node.yaml", "leader"], PODS["multi-node.yaml", "worker"]
    leaders = waits_before_sigterm(leader) + shutdown_timeout(container(leader)["args"])
    assert waits_before_sigterm(worker) >= leaders
    assert worker["spec"]["terminationGracePeriodSeconds"] > waits_before_sigterm(worker)
    # What decides over the model and its caches is the same on both.
    shared = ("load-format", "tensor-parallel", "pipeline-parallel", "nnodes", "kv-cache", "max-model", "tokenizer")
    starts = tuple(f"--{option}" for option in shared)
    one, other = ([arg for arg in container(pod)["args"] if arg.startswith(starts)] for pod in (leader, worker))
    assert one == other and len(one) == len(shared)


@pytest.mark.parametrize("which", [which for which in PODS if which[1] != "worker"], ids=" ".join)
def test_probes_wait_for_the_weights(which):
    inside = container(PODS[which])
    start = inside["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 3600
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert inside[name]["httpGet"] == {"path": "/health", "port": "http"}
    assert {"name": "http", "containerPort": 8000} in inside["ports"]


@pytest.mark.parametrize("manifest", recipes.MANIFESTS, ids=lambda file: file.name)
def test_services_budgets_and_policies_choose_the_pods(manifest):
    found = {document["kind"]: document for document in recipes.objects(manifest)}
    labels = [pod["metadata"]["labels"] for pod in recipes.pods(manifest).values()]
    budget, policy = found["PodDisruptionBudget"]["spec"], found["NetworkPolicy"]["spec"]
    for selector in (budget["selector"]["matchLabels"], policy["podSelector"]["matchLabels"]):
        assert all(selector.items() <= label.items() for label in labels)
    (chosen,) = [label for label in labels if found["Service"]["spec"]["selector"].items() <= label.items()]
    assert chosen.get("role") in (None, "leader")
    # LeaderWorkerSet makes a service of its own name, unless there is one; pods then would not find their leader.
    names = {kind: document["metadata"]["name"] for kind, document in found.items()}
    assert names["Service"] != names.get("LeaderWorkerSet")
    assert budget["maxUnavailable"] == 1
    replicas = (found.get("Deployment") or found["LeaderWorkerSet"])["spec"]["replicas"]
    assert replicas > budget["maxUnavailable"], "else the budget lets the last one go"
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert len({document["metadata"]["namespace"] for document in found.values()}) == 1


# The entry command, as a container would run it

# Arguments: model, cache, key's folder, the folder of this Python if others may not enter it (or ""), a command.
# What stands on the root file system is there as in an image, read-only; /tmp is as small and as strict as Docker's.
CONTAIN = r"""
set -eu
model=$1 cache=$2 key=$3 python=$4; shift 4
ip link set lo up
mount -t tmpfs -o mode=755 tmpfs /srv
mkdir /srv/model /srv/cache /srv/key /srv/python
mount --bind "$model" /srv/model
mount --bind "$cache" /srv/cache
mount --bind "$key" /srv/key
if [ -n "$python" ]; then
  mount --bind "$python" /srv/python
  closed=/$(echo "$python" | cut -d / -f 2)
  mount -t tmpfs -o mode=755 tmpfs "$closed"
  mkdir -p "$python"
  mount --bind /srv/python "$python"
  mount -o remount,bind,ro "$python"
fi
for folder in model key; do mount -o remount,bind,ro "/srv/$folder"; done
mount -t tmpfs -o mode=1777,noexec,nosuid,nodev,size=1g tmpfs /tmp
mount -t tmpfs -o mode=1777,nosuid,nodev,size=1g tmpfs /dev/shm
for compiler in cc c++ gcc g++; do
  path=$(command -v "$compiler") && mount --bind /dev/null "$(readlink -f "$path")" || true
done
mount -o remount,bind,ro /
cd /srv/cache
exec setpriv --reuid USER_ID --regid USER_ID --clear-groups --no-new-privs --bounding-set -all --inh-caps -all "$@"
""".replace("USER_ID", str(USER))


def may_contain() -> bool:
    """May this user make name spaces, mount, and change to another user?"""
    attempt = ["unshare", "-m", "-n", "sh", "-c", "mount -t tmpfs tmpfs /srv && ip link show lo && setpriv true"]
    try:
        tried = subprocess.run(attempt, capture_output=True)
    except FileNotFoundError:
        return False
    return os.geteuid() == 0 and tried.returncode == 0


@pytest.fixture(scope="module")
def contained(tmp_path_factory) -> dict:
    """What contained.py saw and did: see there."""
    if not may_contain():
        pytest.skip("this user may not unshare name spaces and mount, or ip and unshare are not installed")
    if Path("/tmp") in Path(sys.prefix).parents:
        pytest.skip(f"the environment {sys.prefix} is below /tmp, of which the container has its own: clone elsewhere")
    folder = tmp_path_factory.mktemp("contained")
    model, cache, key = folder / "model", folder / "cache", folder / "key"
    write_planted(model, check=False)
    for path in (model, *model.iterdir()):
        path.chmod(0o755)
    for path in (cache, key):
        path.mkdir()
        os.chown(path, USER, USER)
    (key / "api_key").write_text(KEY)
    (key / "api_key").chmod(0o400)
    os.chown(key / "api_key", USER, USER)
    prompt = build_prompt(400, 7, chat=True)
    image = dict(re.findall(r"(\w+)=(\S+)", dict(instructions(IMAGES[1]))["ENV"]))
    environment = image | SERVICE["environment"] | {"HOME": "/srv/cache", "API_KEY_FILE": "/srv/key/api_key"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "VLLM_CPU_KVCACHE_SPACE": "1"}
    sizes = ("/model", "--tensor-parallel-size", "--max-model-len")
    flags = [word for word in SERVICE["command"] if not word.startswith(sizes)]
    asked = {"command": [str(ENTRYPOINT), "/srv/model", *flags, *SMALL], "key": KEY, "text": prompt.text}
    closed = "" if Path(sys.base_prefix).parts[1] not in ("root", "home") else sys.base_prefix
    command = ["unshare", "-m", "-n", "--propagation", "private", "sh", "-c", CONTAIN, "contain"]
    command += [str(model), str(cache), str(key), closed, "env", "-i"]
    command += [f"{name}={value}" for name, value in environment.items()]
    command += [sys.executable, str(ROOT / "tests" / "contained.py"), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"answer wanted": prompt.answer, "cache": cache}


@pytest.mark.slow
@pytest.mark.serve
def test_it_serves_as_its_user_on_a_read_only_tree(contained):
    assert contained["user"] == [USER, USER] and contained["health"] == 200
    assert contained["refused to write"] == contained["tried to write"]
    assert contained["answer"].strip() == contained["answer wanted"]
    written = {path.name for path in contained["cache"].iterdir()}
    assert written <= {".cache", ".config", ".triton", ".nv"}, written


@pytest.mark.slow
@pytest.mark.serve
def test_it_serves_where_no_network_is(contained):
    assert contained["interfaces"] == ["lo"] and contained["routes"] == 0
    assert "unreachable" in contained["outside"]


@pytest.mark.slow
@pytest.mark.serve
def test_the_key_guards_what_security_md_says(contained):
    assert contained["without the key"] == {
        "/v1/models": 401,
        "/v1/chat/completions": 401,
        "/inference/v1/generate": 401,
    }
    assert contained["with the key"] == 200 and contained["with another key"] == 401
    # The hole that SECURITY.md warns of.
    assert contained["invocations without the key"] == 200
    assert contained["docs"] == 404
    assert KEY not in contained["command lines"] and KEY not in contained["log"]


@pytest.mark.slow
@pytest.mark.serve
def test_metrics_in_the_documents_are_on_metrics(contained):
    text = (ROOT / "docs" / "operations.md").read_text()
    told = set(re.findall(r"`(vllm(?::|_dsa_info)\w*)`", text))
    assert len(told) > 8
    for name in told:
        assert re.search(rf"^{name}(_count)?(\{{| )", contained["metrics"], re.MULTILINE), name


@pytest.mark.slow
@pytest.mark.serve
def test_sigterm_cuts_no_answer(contained):
    drained = contained["drained"]
    assert drained["tokens at SIGTERM"] < 100 and drained["tokens"] == 300
    assert drained["finish"] == "length" and drained["done"]
    assert drained["ended"] and drained["left"] == []
