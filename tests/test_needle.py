"""examples/needle.py against servers whose behaviour is known, and (slow) against served planted checkpoints."""

import json
import re
from importlib.util import find_spec

import needle
import pytest
from test_canary import WINDOW, server
from tiny_checkpoint import write_planted

from vllm_dsa.testing.server import serve


def reads_all(prompt: str, max_tokens: int) -> str:
    """English or planted words: the answer that belongs to the key that is asked for."""
    if asked := re.search(r"What is the passcode of the (\w+)\?", prompt):
        found = re.search(rf"passcode of the {asked[1]} is (\d+)\.", prompt)
        return f"It is {found[1]}." if found else "I saw none."
    asked = re.search(r"What is (\w+)\?", prompt)
    found = re.search(rf"{asked[1]}=(\w+)", prompt) if asked else None
    return found[1] if found else "unknown"


def reads_a_window(prompt: str, max_tokens: int) -> str:
    return reads_all(" ".join(prompt.split()[-300:]), max_tokens)


def reads_the_first(prompt: str, max_tokens: int) -> str:
    return re.search(r" is (\d+)\.", prompt)[1] if "passcode" in prompt else ""


def sweep(url: str, folder, *options: str) -> tuple[int, dict]:
    status = needle.main(["--endpoint", url, "--json", str(folder / "needle.json"), *options])
    return status, json.loads((folder / "needle.json").read_text())


def test_a_server_that_reads_all_is_right_everywhere(tmp_path, capsys):
    with server(reads_all) as (url, asked):
        status, report = sweep(url, tmp_path, "--lengths", "500,3000", "--depths", "0,0.5,1", "--keys", "1,4")
    assert (status, report["right"], report["wrong"]) == (0, True, [])
    assert [(c["asked"], c["right"]) for c in report["cells"]] == [(2, 2)] * 12
    out = capsys.readouterr().out
    assert "1 key: 12 of 12 right" in out and "4 keys: 12 of 12 right" in out
    assert re.search(r"depth +500 +3,000  tokens\n +0 +100% +100%\n +0.5 +100% +100%\n +1 +100% +100%\n", out)

    prompts = [body["messages"][0]["content"] for body in asked if "passcode" in json.dumps(body)]
    assert len(prompts) == len(set(prompts)) == 24
    seen = []
    for prompt in prompts:
        tokens, keys = 1.3 * len(prompt.split()), prompt.count("The passcode of the")
        place = re.search(r"What is the passcode of the (\w+)\?", prompt)[1]
        depth = prompt.index(f"passcode of the {place} is") / prompt.rindex("\n\n")
        assert len(set(re.findall(r"is (\d{7})\.", prompt))) == keys
        seen.append((keys, 500 if tokens < 1000 else 3000, round(2 * depth) / 2))
        assert abs(tokens - seen[-1][1]) < 40
    assert sorted(seen) == sorted(2 * [(k, n, d) for k in (1, 4) for n in (500, 3000) for d in (0, 0.5, 1)])


def test_a_server_that_reads_a_window_is_right_at_the_end_alone(tmp_path, capsys):
    with server(reads_a_window) as (url, _):
        status, report = sweep(url, tmp_path, "--lengths", "2000", "--keys", "1")
    assert status == 1
    assert {cell["depth"]: cell["right"] for cell in report["cells"]} == {0: 0, 0.25: 0, 0.5: 0, 0.75: 0, 1: 2}
    assert len(report["wrong"]) == 8
    assert re.search(r"1 key, 2,000 tokens, depth 0: answered 'I saw none.', expected '\d{7}'", capsys.readouterr().out)


def test_a_server_that_takes_any_needle_fails_among_four(tmp_path):
    with server(reads_the_first) as (url, _):
        options = ("--lengths", "2000", "--depths", "0.5", "--repeats", "8")
        status, report = sweep(url, tmp_path, "--keys", "1,4", *options)
    one, four = report["cells"]
    assert (status, one["right"], four["asked"]) == (1, 8, 8)
    assert four["right"] < 7


def test_an_answer_that_names_every_passcode_is_wrong(tmp_path):
    with server(lambda prompt, _: " ".join(re.findall(r"\d{7}", prompt))) as (url, _):
        _, report = sweep(url, tmp_path, "--lengths", "500", "--depths", "0.5", "--keys", "1,2")
    assert [cell["right"] for cell in report["cells"]] == [2, 0]


def test_planted_words(tmp_path):
    options = ("--planted", "4", "--lengths", "400", "--depths", "0,0.5,1", "--keys", "1,8", "--repeats", "1")
    with server(reads_all) as (url, asked):
        assert sweep(url, tmp_path, *options)[0] == 0
    for body in asked:
        words = body["prompt"].split()
        code = words[-1].rstrip("?")
        places = [i for i, word in enumerate(words) if word.startswith(f"{code}=")]
        assert places == list(range(places[0], places[0] + 4))
        assert (body["path"], len(words)) == ("/v1/completions", 398)  # BOS and `?` are tokens, and no words
    with server(reads_a_window) as (url, _):
        _, report = sweep(url, tmp_path, *options)
    assert [cell["right"] for cell in report["cells"]] == [0, 1, 1] * 2


def test_a_server_that_fails_is_named_and_not_judged_and_one_that_fails_at_times_is_wrong(tmp_path, capsys):
    with server(reads_all, key="secret") as (url, _):
        assert needle.main(["--endpoint", url]) == 2
        assert "HTTP 401" in capsys.readouterr().err
    options = ("--planted", "4", "--lengths", "400", "--keys", "1", "--depths", "0,1", "--timeout", "5")
    with server(lambda *_: 1 / 0) as (url, _):
        status, report = sweep(url, tmp_path, *options)
    assert (status, report["right"], ["error" in wrong for wrong in report["wrong"]]) == (2, None, [True] * 4)
    assert "nothing could be judged" in capsys.readouterr().err
    turns = iter([True, False, False, False])
    with server(lambda prompt, n: reads_all(prompt, n) if next(turns) else 1 / 0) as (url, _):
        status, report = sweep(url, tmp_path, *options)
    assert (status, report["right"], len(report["wrong"])) == (1, False, 3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--lengths", "many"), "--lengths many"),
        (("--depths", "0.5,2"), "--depths 0.5,2"),
        (("--keys", "9"), "--keys 9: give numbers from 1 to 8"),
        (("--repeats", "0"), "--repeats 0"),
        (("--clients", "0"), "--clients 0"),
        (("--timeout", "0"), "--timeout 0"),
        (("--planted", "16", "--lengths", "100", "--keys", "8"), "total_tokens: 100; allowed: at least"),
        (("--lengths", "500,16000"), "max_model_len is 16384, which leaves 14336"),
        (("--json", "/nowhere/x.json", "--lengths", "500"), "--json /nowhere/x.json"),
    ],
)
def test_bad_options_are_named(options, says, capsys):
    with server(reads_all, max_model_len=16384) as (url, _):
        assert needle.main(["--endpoint", url, *options]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.skipif(bool(find_spec("matplotlib")), reason="without matplotlib")
def test_without_matplotlib_it_says_how_to_get_it(capsys):
    assert needle.main(["--endpoint", "http://127.0.0.1:9", "--png", "x.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.skipif(not find_spec("matplotlib"), reason="matplotlib is optional, and not here")
def test_the_heat_map(tmp_path):
    with server(reads_a_window) as (url, _):
        needle.main(["--endpoint", url, "--png", str(tmp_path / "x.png"), "--lengths", "500,2000"])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.serve
def test_planted_checkpoint_served_right_wrong_densely_and_with_another_index_topk(tmp_path):
    """100 % as it is; a window-selection fault shows everywhere but at the end; dense attention, which averages
    fillers, is wrong throughout; 8 of the 16 copies are enough."""
    write_planted(tmp_path / "planted", check=False)
    (tmp_path / "sitecustomize.py").write_text(WINDOW)
    options = ("--max-model-len=8192", "--dtype=float32", "--max-num-batched-tokens=2048")
    cases = {
        "right": ({}, ()),
        "window": ({"PYTHONPATH": str(tmp_path)}, ()),
        "dense": ({"VLLM_DSA_DENSE": "1"}, ()),
        "8": ({}, ("--hf-overrides", '{"index_topk": 8}')),
    }
    shares = {}
    for name, (env, more) in cases.items():
        with serve(tmp_path / "planted", *options, *more, env=env) as running:
            sizes = ("--lengths", "1000,4000", "--depths", "0,0.5,1", "--keys", "1,4", "--repeats", "1")
            status, report = sweep(running.base_url, tmp_path, "--planted", "16", *sizes)
        cells = report["cells"]
        shares[name] = {depth: sum(c["right"] for c in cells if c["depth"] == depth) / 4 for depth in (0, 0.5, 1)}
        assert status == int(min(shares[name].values()) < 1)
    all_right, none_right = dict.fromkeys((0, 0.5, 1), 1), dict.fromkeys((0, 0.5, 1), 0)
    assert shares == {"right": all_right, "window": none_right | {1: 1}, "dense": none_right, "8": all_right}
