"""Are the kernels right on this machine, this model's indexer on real text, or a server's long answers?

Without MODEL: every provider that can serve here, against reference.py, over named cases. With MODEL: layouts.py. With
--endpoint: canary.py. Exit status: 0 right, 1 wrong, 2 nothing could be judged (no server, say).
"""

import argparse
import json
from typing import Any

from vllm_dsa import envs
from vllm_dsa.kernels import dispatch
from vllm_dsa.tools.output import Section, UserError, show
from vllm_dsa.tools.progress import progress

EXAMPLE = """examples:
  vllm-dsa verify                                         the kernels, on this machine
  vllm-dsa verify /models/DeepSeek-V3.2 --engine '{"tensor_parallel_size": 8}'
  vllm-dsa verify --endpoint http://127.0.0.1:8000 --lengths 3000,8000      a gate after a server's start

exit status: 0 right, 1 wrong, 2 nothing could be judged: no provider, no server, bad input"""

REFERENCE = "reference"  # the provider that the others are checked against
# Options that mean something in one mode only.
MODES = {
    "the kernels (neither MODEL nor --endpoint)": ("case",),
    "a MODEL": ("text", "tokens", "engine"),
    "an --endpoint": ("lengths", "depths", "model", "completions", "prompts", "timeout"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="MODEL",
        nargs="?",
        help="check the indexer of this folder, or Hugging Face id in the cache",
    )
    parser.add_argument("--provider", choices=_checked(), help="default: all that can serve here")
    parser.add_argument("--json", action="store_true", help="print JSON")
    kernels = parser.add_argument_group("of the kernels")
    kernels.add_argument("--case", action="append", metavar="NAME", help="this case only; may be given several times")
    model = parser.add_argument_group("of a MODEL, which is loaded into vLLM")
    model.add_argument("--text", metavar="FILE", help="the text to read; default: Python's language reference")
    model.add_argument("--tokens", type=int, metavar="N", help="of it; default: 4 x index_topk, at least 2048")
    model.add_argument("--engine", metavar="JSON", help="""arguments of vllm.LLM, as '{"dtype": "float32"}'""")
    endpoint = parser.add_argument_group("of an --endpoint")
    endpoint.add_argument(
        "--endpoint",
        metavar="URL",
        help="ask this OpenAI server for words hidden in long prompts; its key: OPENAI_API_KEY or VLLM_API_KEY",
    )
    endpoint.add_argument(
        "--lengths", metavar="N,N", help="tokens a prompt; default: 3000,8000,32000, as far as they fit"
    )
    endpoint.add_argument("--depths", metavar="X,X", help="where the words are hidden, 0 to 1; default: 0.1,0.5,0.9")
    endpoint.add_argument("--model", metavar="NAME", help="served model; default: the first that the server lists")
    endpoint.add_argument("--completions", action="store_true", default=None, help="/v1/completions in place of chat")
    endpoint.add_argument("--prompts", metavar="FILE", help="own prompts: JSON lines with prompt and answer")
    endpoint.add_argument("--timeout", type=float, metavar="S", help="seconds that one answer may take; default: 300")


def _checked() -> list[str]:
    return [name for name in dispatch.names() if name != REFERENCE]


def run(args: argparse.Namespace) -> int:
    if args.checkpoint and args.endpoint:
        raise UserError("MODEL and --endpoint are two checks. Run one, then the other.")
    modes = list(MODES)
    mode = modes[2] if args.endpoint else modes[1] if args.checkpoint else modes[0]
    for other in MODES.keys() - {mode}:
        for option in MODES[other]:
            if getattr(args, option) is not None:
                raise UserError(f"--{option} is an option of {other}, this checks {mode}. Leave it out.")
    if args.endpoint:
        if args.provider:
            raise UserError(f"--provider {args.provider}: a server has its own. Set VLLM_DSA_PROVIDER where it starts.")
        from vllm_dsa.tools import canary

        return canary.run(args)
    if envs.VLLM_DSA_DENSE:
        raise UserError("VLLM_DSA_DENSE=1 leaves out what this checks. Unset it.")
    if args.checkpoint:
        from vllm_dsa.tools import layouts

        return layouts.run(args)
    return _check_kernels(args)


def _check_kernels(args: argparse.Namespace) -> int:
    asked, names = args.provider or dispatch.forced(), _checked()
    if asked == REFERENCE:
        raise UserError(f"VLLM_DSA_PROVIDER={asked} is what the others are checked against. Unset it.")
    cases = _cases(args.case)
    found = [_check_provider(name, asked, cases) for name in names if asked in (None, name)]
    checked = sum(len(report["cases"]) for report in found)
    faults = sum(bool(case["faults"]) for report in found for case in report["cases"])
    right = None if not checked else not faults
    if args.json:
        print(json.dumps({"right": right, "providers": found}, indent=2))
    else:
        show(_sections(found))
        print(f"{checked} cases, {faults} with a fault" if checked else "no provider serves any of these cases here")
    return 2 if right is None else int(not right)


def _cases(names: list[str] | None) -> list[Any]:
    """Every named case in both dtypes, or those asked for."""
    import torch

    from vllm_dsa.testing.cases import CASES, PUBLISHED, with_dtype

    cases = {case.name: case for case in PUBLISHED}
    cases |= {c.name: c for case in CASES for c in (with_dtype(case, d) for d in (torch.float32, torch.bfloat16))}
    if unknown := set(names or ()) - cases.keys():
        raise UserError(f"--case {unknown.pop()!r} is unknown. Name one of: {'; '.join(cases)}.")
    return [case for name, case in cases.items() if not names or name in names]


def _check_provider(name: str, asked: str | None, cases: list[Any]) -> dict[str, Any]:
    """Results of each case that a provider serves, and its reasons against the others."""
    import torch

    from vllm_dsa.testing.cases import PUBLISHED
    from vllm_dsa.testing.check import request_of
    from vllm_dsa.testing.compare import allowance

    device = "cuda" if torch.cuda.is_available() and asked != "cpu" else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # the cases are small: on a busy machine a second thread costs more than it computes
    provider = next(p for p in dispatch.PROVIDERS if p.name == name)
    served, refused = [], {}
    for case in cases:
        if allowance(name).published_only and case not in PUBLISHED:
            reasons = ["it serves the published sizes: its cases are those called published"]
        else:
            request = request_of(case, device)
            reasons = [reason for op in dispatch.OPS for reason in dispatch.refusals(provider, op, request, name)]
        if not reasons:
            served.append(case)
        for reason in dict.fromkeys(reasons):
            refused[reason] = refused.get(reason, 0) + 1
    results = []
    with progress(f"{name} on {device}", len(served)) as advance:
        for case in served:
            advance(case.name)
            results.append({"case": case.name, "faults": _faults(provider, case, device)})
    return {"provider": name, "device": device, "cases": results, "refused": refused}


def _faults(provider: Any, case: Any, device: str) -> dict[str, str]:
    """operation -> what is wrong with it in this case."""
    from vllm_dsa.testing import check, compare

    kernels, allowed = check.provider_functions(provider), compare.allowance(provider.name)
    options: dict[str, dict[str, Any]] = {op: {"tolerance": allowed.tolerance} for op in ("write", "attend")}
    options["select"] = {"accumulation": allowed.scores(device)}
    faults = {}
    for op, check_op in check.CHECKS.items():
        try:
            check_op(kernels, case, device, **options[op])
        except Exception as error:  # whatever a kernel raises, here it is the result
            kind = "" if isinstance(error, compare.Mismatch) else f"{type(error).__name__}: "
            faults[op] = f"{kind}{error}"
    return faults


def _sections(found: list[dict[str, Any]]) -> list[Section]:
    sections = []
    for report in found:
        section = Section(f"{report['provider']} against reference.py, on {report['device']}")
        for case in report["cases"]:
            if not case["faults"]:
                section.add(case["case"], "write, select, attend", "ok")
            for op, text in case["faults"].items():
                section.add(case["case"], f"{op}: {text}", "fault")
        for reason, count in report["refused"].items():
            section.add(f"refuses {count} case{'s' * (count != 1)}", reason, "note" if report["cases"] else "")
        sections.append(section)
    return sections
