"""Teach a planted checkpoint to think and to call a tool: `add_tools(folder)` after tiny_checkpoint's `write_planted`.

    thinking   after `<think>` come the words of THOUGHT and `</think>`; then it answers as it does without
    tool call  where the answer was `unknown` it now calls `look_up(code=<the code asked for>, limit=16)`

So a code whose facts are in the prompt is answered, any other is looked up, and once the tool's result brings the
facts, it is answered from these. The planted circuit still decides all that: what was retrieved says whether to call,
what was fetched says which code to look up. Attention that finds the wrong rows calls where it should answer.

The rest is a chain without attention. Each token of THINKING and CALL, as the last token, leads to the next one
through a dim of its own, which is on in its embedding and in the head of the one after it. As a token has one
successor, the markup is cut into pieces that are all different. Most are tokens that the tokenizer never finds in a
text: the same markup in a prompt is read as DSML, words and bytes.

The question is fetched from 12 tokens away when the argument is written. Nearness (tiny_checkpoint.py) falls up to
there; so another code asked for less than 6 tokens earlier, as in `red? What is blue?`, blurs the call.
"""

import json
from pathlib import Path

import tiny_checkpoint as tiny
import torch
from planted_text import CODES, DSML, END_THINK, EOS, SPECIAL_TOKENS, THINK, UNKNOWN, VALUES, word_ids
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers

THOUGHT = ("Let", " me", " see")
THINKING = (THINK, *THOUGHT, END_THINK)
ARGUMENT = "{code}</"  # one token for each code
CALL = (
    "\n\n",
    "<",
    DSML,
    'function_calls>\n<｜DSML｜invoke name="',
    'look_up">\n<｜DSML｜parameter name="code" string="true">',
    ARGUMENT,
    "｜DSML｜parameter>\n",
    "<｜DSML｜parameter",
    ' name="limit" string="false">',
    "16",
    "</｜DSML｜parameter>\n</",
    "｜DSML｜invoke>\n",
    "</｜DSML｜function_",
    "calls>",
    EOS,
)
CHAINS = (THINKING, CALL)
LINKS = sum(len(chain) - 1 for chain in CHAINS)  # dims


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


def call_text(code: str) -> str:
    """The tool call as the model spells it."""
    return "".join(CALL[:-1]).format(code=code)


def _extend_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer in `file` with a token for each piece that has none, in the rows after the last token's."""
    content = json.loads(file.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    for piece in (*THINKING, *CALL):
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


def _ids(tokenizer: Tokenizer, piece: str) -> list[int]:
    return [tokenizer.token_to_id(token) for token in _tokens(piece)]


def _links(tokenizer: Tokenizer, hidden_size: int) -> list[tuple[list[int], int, list[int]]]:
    """(ids of a piece, its dim, ids of the piece after it) for each link of the chains; they take the last dims."""
    pairs = [pair for chain in CHAINS for pair in zip(chain, chain[1:], strict=False)]
    dims = range(hidden_size - LINKS, hidden_size)
    return [(_ids(tokenizer, a), dim, _ids(tokenizer, b)) for (a, b), dim in zip(pairs, dims, strict=True)]


def _embedding(rows: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """Rows keep RMS 1: the links' dims are taken from the random identity."""
    hidden = rows.shape[1]
    rows[:, hidden - LINKS :] = 0
    for piece, dim, _ in _links(tokenizer, hidden):
        rows[piece, dim] = tiny.AMPLITUDE
    identity = rows[:, tiny.IDENTITY : hidden - LINKS]
    features = rows.square().sum(1) - identity.square().sum(1)
    identity *= ((hidden - features) / identity.square().sum(1)).sqrt().unsqueeze(1)
    return rows


def _head(head: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """Logits before the final norm, where an answer has 30: what follows in a chain 60, the first piece of a call 30.

    The right argument has 12 more than the others. White space has -8: a JSON grammar allows it everywhere, and a
    model without an opinion would never stop writing it.
    """
    unit = 1 / tiny.AMPLITUDE
    (call,) = _ids(tokenizer, CALL[0])
    head[[call, *(_ids(tokenizer, blank)[0] for blank in "\t\n\r ")], tiny.CONST] = -8 * unit
    for _, dim, following in _links(tokenizer, head.shape[1]):
        head[following, dim] = 60 * unit
    unknown = tiny.ANSWER.start + VALUES.index(UNKNOWN)
    head[word_ids(UNKNOWN), unknown] = 0
    head[call, unknown] = 38 * unit
    for i, token in enumerate(_ids(tokenizer, ARGUMENT)):
        head[token, tiny.FETCHED.start + i] = 12 * unit
    return head
