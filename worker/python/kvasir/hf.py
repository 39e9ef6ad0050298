"""attach: makes a Hugging Face model attend through a Kvasir worker.

Four things change in the model, and detach puts each back:
- its attention implementation is "kvasir", one function for all models, registered on import;
- its rotary module returns cosine 1 and sine 0, so that the function gets keys and queries before
  RoPE: the store keeps raw keys, and the worker rotates what it attends to;
- its decoder's forward is wrapped: it checks the call, tells the worker the token ids and splits a
  long input into passes of chunk_tokens;
- a KvasirCache takes the place of the stock cache, which would keep every key and value.

One thread per cache; different models and caches may run in different threads.
"""

import contextlib
import weakref

import torch
from torch import nn
from transformers import AttentionInterface

from . import hf_cache, hf_model
from .client import Client
from .hf_cache import KvasirCache
from .hf_model import UnsupportedModel
from .worker import Worker

__all__ = [
    "Attachment",
    "KvasirCache",
    "Observer",
    "UnsupportedModel",
    "attach",
    "detach",
    "register",
]

NAME = "kvasir"
NOT_ATTACHED = (
    "the attention implementation 'kvasir' works only on a model that "
    "kvasir.attach(model, ...) has prepared: call it, and pass its cache() as "
    "past_key_values"
)

TRAINING = (
    "kvasir: the model is in training mode; call model.eval(): training is not served, since "
    "dropout and gradients would need keys and values that are not kept"
)

# decoder -> weak reference to its Attachment, which the decoder's own forward keeps alive. A strong
# one would, through Attachment.model, keep every model that was ever attached.
_attachments = weakref.WeakKeyDictionary()


class RawRotary(nn.Module):
    """A rotary module that rotates nothing; keeps the real one for detach."""

    def __init__(self, real):
        super().__init__()
        self.real = real

    def forward(self, x, position_ids):
        """cos 1 and sin 0, [batch, tokens, head_dim] in x's dtype."""
        shape = (*position_ids.shape, 2 * self.real.inv_freq.numel())
        return x.new_ones(shape), x.new_zeros(shape)


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """
    The registered function: query [B, Hq, T, d], key and value [B, Hkv, T, d], before RoPE.
    Returns ([B, T, Hq, d], None).
    """
    cache = hf_cache.current()
    if cache is None:
        raise RuntimeError(NOT_ATTACHED)
    if kwargs.get("s_aux") is not None or kwargs.get("softcap"):
        raise UnsupportedModel("attention sinks or softcapped logits")
    if dropout or module.training:
        raise ValueError(TRAINING)
    geometry = cache.attachment.geometry
    if scaling is not None and abs(scaling - geometry.attention_scale) > 1e-6:
        raise UnsupportedModel(f"layer {module.layer_idx} scales attention by {scaling}")
    if query.shape[0] > 1:
        return cache.forward(module.layer_idx, query, key, value), None
    rows = [x[0].transpose(0, 1).contiguous() for x in (query, key, value)]
    out = cache.sequence.forward(module.layer_idx, *rows)
    if cache.attachment.observer is not None:
        cache.attachment.observer.on_layer(cache, module.layer_idx, *rows, out)
    return out[None], None


def register():
    """Registers the implementation's name; done on import, harmless to repeat."""
    AttentionInterface.register(NAME, attention)


class Observer:
    """
    Sees what passes by, of caches of one sequence; both slots are optional to override. Set
    Attachment.observer.
    """

    def on_pass(self, cache, ids):
        """Before a pass over ids [n]; cache.n_tokens is the first one's position."""

    def on_layer(self, cache, layer, q, k, v, out):
        """After a layer attended: q, out [n, n_q_heads, d], k, v [n, n_kv_heads, d], raw."""


class Attachment:
    """A model, its worker and what detach needs; made by attach."""

    def __init__(self, model, base, geometry, worker, client):
        self.model, self.geometry, self.worker = model, geometry, worker
        self._base, self._own_client = base, client
        self._saved = None
        self.observer = None  # an Observer, for tests and reports

    def cache(self, tokens=(), adapter=None, salt=None):
        """
        A KvasirCache over a prompt's token ids, all of it, known beforehand (may be empty):
        .n_reused of them are in the store and need no prefill. ids [B, n] of B prompts of one
        length: a cache of B sequences, of which .n_reused is what all have. adapter: id and
        revision of the weights that were put on the model after attach (LoRA); salt: of a user or
        session. Caches share blocks only where both are equal.
        """
        prompts = tokens if hasattr(tokens, "dim") and tokens.dim() == 2 else [tokens]
        return KvasirCache(self, hf_cache.open_alike(self.worker, prompts, adapter, salt))

    def prefill(self, cache, tokens, progress=None):
        """
        Runs those of tokens ([n], or [B, n] of B sequences) that the cache lacks, in passes of
        chunk_tokens, without computing logits. progress(n_done, n_total) is called after each pass.
        generate() wants at least one token that was not run.
        """
        ids = torch.as_tensor(tokens).to(hf_model.device_of(self._base))
        ids = ids.view(len(cache.sequences), -1)
        end = ids.shape[1]
        with torch.inference_mode():
            while cache.n_tokens < end:
                n = min(self.worker.chunk_tokens, end - cache.n_tokens)
                first = cache.n_tokens
                self._base(
                    input_ids=ids[:, first : first + n], past_key_values=cache, use_cache=True
                )
                if progress is not None:
                    progress(cache.n_tokens, end)

    def install(self):
        """Changes the model (see the head of this file), wholly or not at all."""
        model, base = self.model, self._base
        stock = base.forward
        self._saved = (
            model.config._attn_implementation,
            base.rotary_emb,
            vars(base).get("forward"),
        )

        def forward(*args, **kwargs):
            return self._forward(stock, *args, **kwargs)

        try:
            model.set_attn_implementation(NAME)
            base.rotary_emb = RawRotary(base.rotary_emb)
            base.forward = forward
            _attachments[base] = weakref.ref(self)
        except BaseException:
            self._restore()
            raise

    def _restore(self):
        implementation, rotary, forward = self._saved
        self._saved = None
        vars(self._base).pop("forward", None)
        if forward is not None:  # the model had one of its own
            self._base.forward = forward
        self._base.rotary_emb = rotary
        _attachments.pop(self._base, None)
        self.model.set_attn_implementation(implementation)

    def detach(self):
        """Puts the model back, closes the worker (and the client that attach opened)."""
        if self._saved is None:
            return
        self._restore()
        self._close()

    def _close(self):
        self.worker.close()
        if self._own_client is not None:
            self._own_client.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.detach()

    def _forward(
        self,
        stock,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        **kwargs,
    ):
        if self._base.training:
            raise ValueError(TRAINING)
        cache = self._check_cache(past_key_values)
        _check_input(cache, input_ids, attention_mask, position_ids, inputs_embeds, kwargs)
        chunk, n = self.worker.chunk_tokens, input_ids.shape[1]
        if n > chunk and kwargs.get("output_hidden_states"):
            raise ValueError(f"kvasir: output_hidden_states needs passes of at most {chunk} tokens")
        outputs = [
            self._pass(stock, cache, input_ids[:, i : i + chunk], kwargs)
            for i in range(0, n, chunk)
        ]
        last = outputs[-1]
        if len(outputs) > 1:
            last.last_hidden_state = torch.cat([o.last_hidden_state for o in outputs], 1)
        return last

    def _check_cache(self, cache):
        if not isinstance(cache, KvasirCache):
            raise ValueError(
                "kvasir: pass past_key_values=attachment.cache(prompt_ids); a "
                f"{type(cache).__name__} would not hold this model's keys and values"
            )
        if cache.attachment is not self:
            raise ValueError("kvasir: this cache belongs to another attachment")
        cache.check()
        return cache

    def _pass(self, stock, cache, ids, kwargs):
        n = ids.shape[1]
        rows = ids.cpu()
        cache.each(lambda i, sequence: sequence.tokens(rows[i]))
        if self.observer is not None and len(ids) == 1:
            self.observer.on_pass(cache, ids[0])
        hf_cache.set_current(cache)
        try:
            out = stock(input_ids=ids, past_key_values=cache, **{**kwargs, "use_cache": True})
        except BaseException as error:
            cache.broken = error
            raise
        finally:
            hf_cache.set_current(None)
        cache.n_tokens += n
        return out


def _check_input(cache, input_ids, attention_mask, position_ids, inputs_embeds, kwargs):
    if input_ids is None or inputs_embeds is not None:
        raise ValueError("kvasir: input_ids are needed: token ids name the blocks in the store")
    if input_ids.dim() != 2 or input_ids.shape[0] != len(cache.sequences):
        raise ValueError(
            f"kvasir: input_ids of {input_ids.shape[0]} sequences, but the cache has "
            f"{len(cache.sequences)}: give cache() the prompts of all, [B, tokens]; beam search "
            "and num_return_sequences would need copies of a sequence"
        )
    if attention_mask is not None:
        mask = torch.as_tensor(attention_mask)
        if mask.dim() != 2 or not bool((mask != 0).all()):
            raise ValueError(
                "kvasir: padding is not supported (prompts of a batch have one length): the "
                "attention mask must be all ones, [B, tokens], or absent (generate() guesses one "
                "from pad tokens in the prompt unless it is given)"
            )
    if position_ids is not None:
        want = torch.arange(cache.n_tokens, cache.n_tokens + input_ids.shape[1])
        rows = position_ids.reshape(-1, len(want)).cpu()
        if not torch.equal(rows, want.expand(len(rows), -1)):
            raise ValueError(f"kvasir: positions must go on from {cache.n_tokens} without gaps")
    if kwargs.get("output_attentions"):
        raise ValueError("kvasir: attention weights are never computed as a whole")


def _attached(base):
    """The Attachment of a decoder, or None."""
    reference = _attachments.get(base)
    return None if reference is None else reference()


def _clients(client):
    """What Worker takes, and what closes those that were opened here."""
    with contextlib.ExitStack() as own:

        def opened(one):
            return own.enter_context(Client(one)) if isinstance(one, str) else one

        if isinstance(client, (list, tuple)):
            client = [opened(one) for one in client]
        else:
            client = opened(client)
        return client, own.pop_all()


def attach(model, client=None, selector="tokenselect", model_id=None, revision=None, **options):
    """
    Makes model attend through a worker; returns an Attachment. client: a Client, a URI (opened and
    closed with the attachment), a list of either (a store of several servers), or None (no store,
    every row stays resident). model_id and revision
    name the weights in the store; by default the config's name and a fingerprint of the weights.
    Other keywords are Worker's; a model on a GPU needs backend="cuda" (or "cuda:N"), and selector
    "esa" with index "compressed". UnsupportedModel says why a model cannot be done.
    """
    if _attached(hf_model.base_of(model)) is not None:
        raise RuntimeError("kvasir: this model is attached already; detach it first")
    geometry, base = hf_model.geometry_of(model)
    options = hf_model.on_device(hf_model.device_of(base), options)
    client, own = _clients(client)
    try:
        worker = Worker(
            geometry,
            model_id or hf_model.model_id(model),
            selector,
            client,
            revision or hf_model.fingerprint(model),
            **options,
        )
    except BaseException:
        own.close()
        raise
    attachment = Attachment(model, base, geometry, worker, own)
    try:
        attachment.install()
    except BaseException:
        attachment._close()
        raise
    return attachment


def detach(model):
    """Undoes attach(model); a model that is not attached is left alone."""
    attachment = _attached(hf_model.base_of(model))
    if attachment is not None:
        attachment.detach()


register()
