"""Teach a planted checkpoint (tiny_checkpoint.py) to think and to call a tool: `add_tools(folder)` after `write_planted`.

    thinking   after `<think>` come the words of THOUGHT and `</think>`; then it answers as it does without
    tool call  where the answer was `unknown` it now calls `look_up(code=<the code asked for>, limit=16)`

So a code whose facts are in the prompt is answered, any other is looked up, and once the tool's result brings the
facts, it is answered from these. The planted circuit still decides all that: what was retrieved says whether to call,
what was fetched says which code to look up. Attention that finds the wrong rows calls where it should answer.

The rest is a chain without attention. Each token of THINKING and CALL, as the last token, leads to the next one
through a dim of its own: dim STEP + i of the residual stream is on in the i-th token, and in the head of the one after
it. As a token has one successor, the markup is cut into pieces that are all different. Most are tokens that the
tokenizer never finds in a text: it reads the same markup in a prompt as DSML, words and bytes.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import AMPLITUDE, ANSWER, CODES, CONST, DSML, END_THINK, EOS, FETCHED, IDENTITY
from tiny_checkpoint import SPECIAL_TOKENS, THINK, UNKNOWN, VALUES, word_ids
from tokenizers import Tokenizer, pre_tokenizers

TOOL, LIMIT = "look_up", 16
THOUGHT = ("Let", " me", " see")
THINKING = (THINK, *THOUGHT, END_THINK)
ARGUMENT = "{code}</"  # one token for each code
CALL = (
    "\n\n", "<", DSML, 'function_calls>\n<｜DSML｜invoke name="', f'{TOOL}">\n<｜DSML｜parameter name="code" string="true">',
    ARGUMENT, "｜DSML｜parameter>\n", "<｜DSML｜parameter", ' name="limit" string="false">', str(LIMIT), "</｜DSML｜parameter>\n</",
    "｜DSML｜invoke>\n", "</｜DSML｜function_", "calls>", EOS,
)  # fmt: skip
CHAINS = (THINKING, CALL)
STEPS = sum(len(chain) - 1 for chain in CHAINS)  # dims


def add_tools(path: str | Path) -> Tokenizer:
    """Change the planted checkpoint in `path` and return its new tokenizer. The config stays as it is."""
    path = Path(path)
    tokenizer = _extend_tokenizer(path / "tokenizer.json")
    rows, needed = json.loads((path / "config.json").read_text())["vocab_size"], tokenizer.get_vocab_size()
    if rows < needed:
        raise ValueError(f"vocab_size: {rows}; allowed with tools: at least {needed}")
    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():  # also the MTP layers' copies
            if name.endswith("embed_tokens.weight"):
                tensor.copy_(_embedding(tensor.float(), tokenizer))
            elif name.endswith(("lm_head.weight", "shared_head.head.weight")):
                tensor.copy_(_head(tensor.float(), tokenizer))
        save_file(tensors, shard, metadata={"format": "pt"})
    tokenizer.save(str(path / "tokenizer.json"))
    return tokenizer


def _extend_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer in `file` with a token for each piece that has none, in the rows after the last token's."""
    content = json.loads(file.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    for piece in (piece for chain in CHAINS for piece in chain):
        for token in _tokens(piece):
            vocab.setdefault(token, len(vocab))
    return Tokenizer.from_str(json.dumps(content))


def _tokens(piece: str) -> list[str]:
    """What the vocabulary calls the token of a piece; of ARGUMENT, one for each code."""
    if piece == ARGUMENT:
        return [ARGUMENT.format(code=code) for code in CODES]
    if piece in SPECIAL_TOKENS:
        return [piece]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [byte_level.pre_tokenize_str(piece)[0][0]]


def _links(tokenizer: Tokenizer, hidden_size: int) -> list[tuple[list[int], int, list[int]]]:
    """(ids of the tokens of a piece, its dim, ids of those that follow), for each link of the chains."""
    links, dim = [], hidden_size - STEPS
    for chain in CHAINS:
        ids = [[tokenizer.token_to_id(token) for token in _tokens(piece)] for piece in chain]
        for piece, following in zip(ids, ids[1:], strict=False):
            links.append((piece, dim, following))
            dim += 1
    return links


def _embedding(rows: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """The steps take the last dims of the random identity; rows keep RMS 1."""
    hidden = rows.shape[1]
    rows[:, hidden - STEPS :] = 0
    for piece, dim, _ in _links(tokenizer, hidden):
        rows[piece, dim] = AMPLITUDE
    identity = rows[:, IDENTITY : hidden - STEPS]
    features = rows.square().sum(1) - identity.square().sum(1)
    identity *= ((hidden - features) / identity.square().sum(1)).sqrt().unsqueeze(1)
    return rows


def _head(head: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """Logits before the final norm, where an answer has 30: a successor 60, the first piece of a call 30.

    The right argument has 12 more than the others. White space has -8: a JSON grammar allows it everywhere, and a
    model without an opinion would never stop writing it.
    """
    blanks = [tokenizer.token_to_id(token) for blank in "\t\n\r " for token in _tokens(blank)]
    call = tokenizer.token_to_id(_tokens(CALL[0])[0])
    head[[*blanks, call], CONST] = -8 / AMPLITUDE
    for _, dim, following in _links(tokenizer, head.shape[1]):
        head[following, dim] = 60 / AMPLITUDE
    unknown = ANSWER.start + VALUES.index(UNKNOWN)
    head[word_ids(UNKNOWN), unknown] = 0
    head[call, unknown] = 38 / AMPLITUDE
    for i, token in enumerate(_tokens(ARGUMENT)):
        head[tokenizer.token_to_id(token), FETCHED.start + i] = 12 / AMPLITUDE
    return head
