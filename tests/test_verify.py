"""`vllm-dsa verify` of kernels and of models: what is right passes, every planted fault is named and gives status 1."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny_checkpoint import make_config, random_tensors
from train_tiny import SIZES, STEPS, swap_layout, text, train, write

from vllm_dsa.kernels import cpu, dispatch
from vllm_dsa.testing.cases import CASES, PUBLISHED
from vllm_dsa.tools import layouts
from vllm_dsa.tools.main import main

# One an operation of what test_kernel_faults.py has, and a kernel that raises.
FAULTS = {
    "write": "write = cpu.write_keys\ncpu.write_keys = lambda *a: write(*a[:6], a[6] + 1, *a[7:])",
    "select": "select = cpu.select\ncpu.select = lambda *a: (select(*a), a[-1].copy_(a[-1].roll(1, 1)))",
    "attend": "attend = cpu.attend\ncpu.attend = lambda *a: attend(*a[:4], 1.0, a[5])",
    "select, an error": "def select(*a): raise IndexError('page 7')\ncpu.select = select",
}
CASE = ("--case", "mixed bfloat16")


def verify(*options: str, plant: str = "", **env: str) -> subprocess.CompletedProcess:
    code = (
        f"import sys\nfrom vllm_dsa.kernels import cpu\n{plant}\nfrom vllm_dsa.tools.main import main\nsys.exit(main())"
    )
    command = [sys.executable, "-c", code, "verify", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | env)


SOME = ("at top_k float32", "ties few bfloat16", "fp8 v32 bfloat16", "published decode", "published glm")


@pytest.mark.parametrize("names", [SOME, pytest.param((), marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_cpu_provider_is_right(names):
    done = verify("--json", *(part for name in names for part in ("--case", name)))
    report = json.loads(done.stdout)
    assert (done.returncode, report["right"]) == (0, True)
    by_name = {provider["provider"]: provider for provider in report["providers"]}
    count = len(names) or 2 * len(CASES) + len(PUBLISHED)
    assert [case["faults"] for case in by_name["cpu"]["cases"]] == [{}] * count
    assert by_name["triton"]["refused"] == {"it runs on CUDA GPUs, the layer is on cpu": count}
    assert "reference" not in by_name


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_kernel_fault_is_named(fault):
    done = verify(*CASE, plant=FAULTS[fault])
    assert done.returncode == 1, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if "fault" in line)
    assert line.split()[:4] == ["fault", "mixed", "bfloat16", f"{fault.split(',')[0]}:"]
    assert ("IndexError: page 7" in line) == ("error" in fault)
    assert "1 cases, 1 with a fault" in done.stdout


def test_a_fault_of_one_case_does_not_hide_the_others(monkeypatch, capsys, one_thread):
    monkeypatch.setattr(cpu, "attend", lambda *a: a[-1].zero_())
    assert main(["verify", "--json", *CASE, "--case", "one token float32"]) == 1
    cases = json.loads(capsys.readouterr().out)["providers"][-1]["cases"]
    assert [list(case["faults"]) for case in cases] == [["attend"], ["attend"]]


def test_a_new_provider_is_verified_without_being_named_anywhere_else(monkeypatch, capsys, one_thread):
    """Whatever serves is checked: a right one passes by the strictest allowance, a wrong one is a fault."""
    new = dispatch.Provider("new", dict.fromkeys(dispatch.OPS, "vllm_dsa.kernels.cpu"), lambda request: [])
    wrong = replace(new, name="wrong", modules=dict.fromkeys(dispatch.OPS, "wrong_kernels"))
    functions = {name: getattr(cpu, name) for names in dispatch.FUNCTIONS.values() for name in names}
    functions["attend"] = lambda *a: cpu.attend(*a[:4], 1.001 * a[4], a[5])
    monkeypatch.setitem(sys.modules, "wrong_kernels", SimpleNamespace(**functions))
    monkeypatch.setattr(dispatch, "PROVIDERS", (new, wrong, *dispatch.PROVIDERS))
    assert main(["verify", "--json", *CASE]) == 1
    found = {report["provider"]: report["cases"] for report in json.loads(capsys.readouterr().out)["providers"]}
    assert [list(case["faults"]) for case in found["new"]] == [[]]
    assert [list(case["faults"]) for case in found["wrong"]] == [["attend"]]
    assert main(["verify", "--provider", "new", *CASE]) == 0


@pytest.mark.parametrize(
    ("options", "env", "says"),
    [
        (("--provider", "vendor", *CASE), {}, "no provider serves any of these cases here"),
        (CASE, {"VLLM_DSA_PROVIDER": "triton"}, "it runs on CUDA GPUs"),
        (CASE, {"VLLM_DSA_PROVIDER": "cuda"}, "VLLM_DSA_PROVIDER='cuda' is not one of vendor, triton"),
        ((), {"VLLM_DSA_PROVIDER": "reference"}, "what the others are checked against"),
        (("--case", "nothing"), {}, "Name one of: published decode; "),
        (("--text", "x"), {}, "--text is an option of a MODEL"),
        (("/nowhere", *CASE), {}, "--case is an option of the kernels"),
        (("/nowhere",), {}, "'/nowhere' is no folder here and no Hugging Face id in the cache"),
        (("/nowhere", "--endpoint", "http://127.0.0.1:1"), {}, "two checks"),
    ],
)
def test_what_cannot_be_judged_says_why(options, env, says, monkeypatch, capsys):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert main(["verify", *options]) == 2
    assert says in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        ('{"model_type": "llama"}', (), "not a DSA model"),
        ("{", (), "cannot be read as JSON"),
        (None, ("--text", "/nowhere"), "--text /nowhere"),
        (None, ("--tokens", "100"), "--tokens 100"),
        (None, ("--engine", "[]"), "a JSON object"),
    ],
)
def test_bad_models_and_options_are_named(tmp_path, content, options, says, capsys):
    config = make_config(**SIZES)
    (tmp_path / "config.json").write_text(json.dumps(config) if content is None else content)
    assert main(["verify", str(tmp_path), *options]) == 2
    out, err = capsys.readouterr()
    assert (out, says in err) == ("", True), err


def test_a_hugging_face_id_is_taken_from_the_cache(tmp_path, monkeypatch, capsys):
    """As doctor and plan take it; vLLM is given the snapshot's folder."""
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(make_config(**SIZES)))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(layouts, "ENGINE_ENV", {})
    given = {}

    def llm(**options):
        given.update(options)
        raise ValueError("enough")

    monkeypatch.setitem(vars(layouts.compat), "LLM", llm)
    assert main(["verify", "some/model", "--engine", '{"dtype": "float32"}']) == 2
    assert (given["model"], given["dtype"]) == (str(snapshot), "float32")
    assert f"vLLM did not load {snapshot}: enough" in capsys.readouterr().err
    assert main(["verify", "some/other"]) == 2
    assert "hf download some/other config.json" in capsys.readouterr().err


def test_without_vllm_it_says_so(tmp_path):
    hide = (
        "from importlib import util\nfind = util.find_spec\nutil.find_spec = lambda n: None if n == 'vllm' else find(n)"
    )
    (tmp_path / "config.json").write_text(json.dumps(make_config(**SIZES)))
    done = verify(str(tmp_path), plant=hide)
    assert done.returncode == 2
    assert "not importable here" in done.stderr


def layer(configured: float, other: float, best: float = 0.8, noise: float = 0.01, **changes) -> dict:
    """One layer's report: shares of mass that go up and down from row to row by ``noise``."""
    rows = [
        {
            "length": 500,
            "keys": 50,
            "best": best,
            "chance": 0.1,
            "configured": configured + sign * noise,
            "other": other,
        }
        | {"served": configured, "agreement": 1.0}
        for sign in (-1, 1) * 32
    ]
    report = {"layer": "l", "interleaved": False, "providers": {"select": "cpu"}, "rows": rows, "faults": []}
    return report | changes


@pytest.mark.parametrize(
    ("layers", "verdict"),
    [
        ([layer(0.7, 0.4)], "right"),
        ([layer(0.4, 0.7)], "wrong"),
        ([layer(0.7, 0.4), layer(0.6, 0.61), layer(0.5, 0.5)], "right"),
        ([layer(0.115, 0.101, best=0.115)], "cannot judge"),  # attention is spread evenly
        ([layer(0.2, 0.1)], "cannot judge"),  # hardly better than chance
        ([layer(0.7, 0.68)], "cannot judge"),  # about the same
        ([layer(0.7, 0.6, noise=0.3)], "cannot judge"),  # within the rows' noise
        ([layer(0.7, 0.4, faults=["row 3: a position twice"])], "wrong"),
    ],
)
def test_the_verdict(layers, verdict):
    assert layouts.judge(layers)["verdict"] == verdict


def test_a_selection_far_from_the_references_is_wrong():
    rows = [row | {"agreement": 0.9} for row in layer(0.7, 0.4)["rows"]]
    report = layouts.judge([layer(0.7, 0.4, rows=rows)])
    assert (report["verdict"], report["layout"]) == ("wrong", "right")
    assert "90.0% of reference.py's selection" in report["faults"][0]


# One process for all, since it is vLLM's import that takes long; each has its own engine.
MODELS = """
import json, sys
from vllm_dsa.tools import main
for folder in sys.argv[2:]:
    common = ["--text", sys.argv[1], "--tokens", "512", "--engine", '{"dtype": "float32"}', "--json"]
    print("status", main.main(["verify", folder, *common]), flush=True)
"""


def verdicts(tmp_path, tensors_by_name: dict, config: dict, plant: str = "") -> dict[str, tuple[int, dict]]:
    """Name -> (exit status, report) of each model."""
    (tmp_path / "text.txt").write_text(text(1024, seed=0))
    for name, tensors in tensors_by_name.items():
        write(tmp_path / name, config, tensors)
    command = [
        sys.executable,
        "-c",
        plant + MODELS,
        tmp_path / "text.txt",
        *(tmp_path / name for name in tensors_by_name),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.stdout.count("status") == len(tensors_by_name), done.stderr[-3000:]
    reports = done.stdout.split("status ")
    statuses = [int(part.split("\n")[0]) for part in reports[1:]]
    bodies = [json.loads(part[part.index("{") :]) for part in reports[:-1]]
    return dict(zip(tensors_by_name, zip(statuses, bodies, strict=True), strict=True))


def test_a_trained_model_shows_which_layout_is_right(tmp_path, one_thread):
    config, tensors = train(STEPS)
    models = {"right": tensors, "wrong": swap_layout(config, tensors), "untrained": random_tensors(config, seed=1)}
    found = verdicts(tmp_path, models, config)
    assert {name: (status, report["verdict"]) for name, (status, report) in found.items()} == {
        "right": (0, "right"),
        "wrong": (1, "wrong"),
        "untrained": (2, "cannot judge"),
    }
    for _, report in found.values():
        assert report["faults"] == []
        assert min(layer["agreement"] for layer in report["layers"]) > 0.98
    # To its first layer the swapped model is the same one: what the one layout holds here, the other holds there.
    right, wrong = found["right"][1]["layers"][0], found["wrong"][1]["layers"][0]
    assert abs(right["configured"] - wrong["other"]) < 1e-3
    worth = found["right"][1]["worth"]
    assert worth["configured"] - worth["other"] > 0.15


@pytest.mark.slow
def test_with_half_of_the_index_dims_rotated_as_published(tmp_path, one_thread):
    config, tensors = train(200, index_head_dim=32)
    found = verdicts(tmp_path, {"right": tensors, "wrong": swap_layout(config, tensors)}, config)
    assert {name: (status, report["verdict"]) for name, (status, report) in found.items()} == {
        "right": (0, "right"),
        "wrong": (1, "wrong"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["write", "select"])
def test_a_planted_kernel_fault_shows_in_a_model(tmp_path, fault, one_thread):
    """Index queries written in the other layout; a window selected."""
    plants = {
        "write": """
from dataclasses import replace
from vllm_dsa.kernels import cpu
queries = cpu.write_queries
def write_queries(rope_query, index_query, head_weights, rope, *rest):
    swapped = replace(rope, index_interleaved=not rope.index_interleaved)
    return queries(rope_query, index_query, head_weights, swapped, *rest)
cpu.write_queries = write_queries
""",
        "select": """
import torch
from vllm_dsa.kernels import cpu
def select(codes, weights, index_cache, rows, out):
    positions = (rows.lengths.unsqueeze(1) - out.shape[1]).clamp(min=0) + torch.arange(out.shape[1])
    out.copy_(positions.masked_fill(positions >= rows.lengths.unsqueeze(1), -1))
cpu.select = select
""",
    }
    config, tensors = train(STEPS)
    status, report = verdicts(tmp_path, {"right": tensors}, config, plants[fault])["right"]
    assert (status, report["verdict"]) == (1, "wrong")
    assert report["faults"]
