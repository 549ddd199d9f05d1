"""Pre-training from text, on one device, resumable bit for bit.

    moge-hal train OUT --steps 5000            (started again, it goes on from
    OUT/state.safetensors)

OUT gets state.safetensors (see `train_state.py`), log.jsonl (one line a validation), training.json
(the recipe and what came of it), curve.png, and at the end model/, a folder in the released layout.
"""

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moge_hal.backend import Backend
from moge_hal.bind import bind
from moge_hal.checkpoint import save
from moge_hal.config import Config
from moge_hal.errors import UserError
from moge_hal.files import write_file
from moge_hal.model import Transformer
from moge_hal.registry import settings
from moge_hal.router import auxiliary_loss, expert_load
from moge_hal.training.bpe import train_bpe
from moge_hal.training.data import Document, Packed, batch, pack, read_corpus, split
from moge_hal.training.init import initial_weights
from moge_hal.training.log import draw_log, read_log, write_log
from moge_hal.training.ngram import ngram_bits_per_byte
from moge_hal.training.state import load_state, save_state

STATE, LOG, CURVE = "state.safetensors", "log.jsonl", "curve.png"
SUMMARY, MODEL = "training.json", "model"


@dataclass(frozen=True)
class Recipe:
    """What a run does. Every field shapes the result, so every field belongs to the identity of the
    run.

    A step trains on rows x length tokens. The learning rate rises linearly over `warmup` steps and
    falls along a cosine to `final` of its peak at the last step. Weight decay spares
    one-dimensional weights. autocast: products in bfloat16, with float32 weights, norms, router and
    softmax.
    """

    steps: int = 5000
    rows: int = 4
    length: int = 512
    peak: float = 4e-3
    warmup: int = 100
    final: float = 0.01
    decay: float = 0.1
    clip: float = 1.0
    seed: int = 1
    autocast: bool = True

    def __post_init__(self) -> None:
        rules = {
            "steps": (self.steps >= 1, "at least 1"),
            "rows": (self.rows >= 1, "at least 1"),
            "length": (self.length >= 2, "at least 2"),
            "peak": (self.peak > 0, "above 0"),
            "warmup": (
                0 <= self.warmup < max(self.steps, 1),
                f"from 0 to {self.steps - 1} (steps - 1)",
            ),
            "final": (0 <= self.final <= 1, "between 0 and 1"),
            "decay": (self.decay >= 0, "not negative"),
            "clip": (self.clip > 0, "above 0"),
            "seed": (0 <= self.seed < 2**64, "from 0 to 2**64 - 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise UserError(f"{name} = {getattr(self, name)} must be {rule}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        return self.peak * (self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class Validation:
    """Held-out text under the model, and where its tokens went."""

    step: int
    loss: float  # nats a token
    bits_per_byte: float
    busiest: float  # the busiest expert's load over the mean, averaged over layers
    idlest: float  # the idlest expert's load over the mean, the least of all layers
    load: list[list[float]]  # [L, E], mean 1


# Called after every step with its number, its loss and, if there was one, the validation.
Observer = Callable[[int, float, Validation | None], None]


def train(
    out: Path,
    config: Config,
    recipe: Recipe,
    backend: Backend,
    corpus: Path,
    *,
    validate_every: int = 200,
    observe: Observer = lambda step, loss, validation: None,
) -> Validation:
    """Trains until recipe.steps, going on from OUT if a run with the same identity was interrupted
    there.

    The vocabulary is trained on the corpus too (at most config.vocab_size tokens). `observe` is
    called after every step. MOGE_HAL_OPS and MOGE_HAL_STRICT apply. Raises `UserError` for an
    unusable corpus, a foreign output folder or a state that belongs to another run.
    """
    if validate_every < 1:
        raise UserError(f"validate_every = {validate_every} must be at least 1")
    if recipe.length > config.max_position_embeddings:
        raise UserError(
            f"length = {recipe.length} must not exceed the context of "
            f"max_position_embeddings = {config.max_position_embeddings}"
        )
    _check_folder(out)
    environment = settings()
    documents, held_out = split(read_corpus(corpus))
    tokenizer = train_bpe((document.text for document in documents), config.vocab_size)
    config = replace(
        config,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    _check_memory(config, backend)
    tokens, held_out_tokens = pack(documents, tokenizer), pack(held_out, tokenizer)
    identity = {
        "config": asdict(config),
        "recipe": asdict(recipe),
        "corpus": _digest(documents),
        "tokenizer": tokenizer.digest,
        "backend": " ".join([backend.name, *(f"{op}=default" for op in environment.overrides)]),
        "threads": torch.get_num_threads(),  # sums are split among them, so the bits depend on it
    }
    model = bind(
        config,
        initial_weights(config, recipe.seed),
        backend,
        "train",
        environment.overrides,
        strict=environment.strict,
        dtype=torch.float32,
    )
    model.tokenizer = tokenizer
    transformer = model.run_step
    assert isinstance(transformer, Transformer)  # what `bind` gives in mode "train"
    parameters = dict(transformer.named_parameters())
    optimizer = _optimizer(parameters.values(), recipe)
    batch(tokens.tokens, recipe.seed, 0, recipe.rows, recipe.length)  # refuses too short a text
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}); name another folder") from error
    state, first = out / STATE, 0
    if state.exists():
        first = load_state(state, parameters, optimizer, identity)
    records = read_log(out / LOG, first)
    losses: list[float] = []
    started = time.perf_counter()
    for step in range(first, recipe.steps):
        x, y = batch(tokens.tokens, recipe.seed, step, recipe.rows, recipe.length)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        losses.append(_step(transformer, optimizer, x, y, recipe))
        done = step + 1
        validation = None
        if done % validate_every == 0 or done == recipe.steps:
            validation = validate(transformer, held_out_tokens, recipe, done)
            mean = sum(losses) / len(losses)  # since the last validation, where a resume starts
            records.append({"train_loss": mean, "rate": recipe.rate(step), **_short(validation)})
            write_log(out / LOG, records)
            save_state(state, parameters, optimizer, done, identity)
        observe(done, losses[-1], validation)
        if validation is not None:
            losses.clear()
    seconds = time.perf_counter() - started
    # The last word is said in float32, as the model will be used.
    exact = replace(recipe, autocast=False)
    validation = validate(transformer, held_out_tokens, exact, recipe.steps)
    trained = (recipe.steps - first) * recipe.rows * recipe.length
    summary = {
        "identity": identity,
        "parameters": config.count_parameters(),
        "corpus_bytes": tokens.bytes,
        "corpus_tokens": len(tokens.tokens),
        "held_out_bytes": held_out_tokens.bytes,
        "trained_tokens": recipe.steps * recipe.rows * recipe.length,
        "tokens_per_second": round(trained / seconds) if trained else None,  # validations included
        "validation": asdict(validation),
        "five_gram_bits_per_byte": ngram_bits_per_byte(_text(documents), _text(held_out)),
        "torch": torch.__version__,
    }
    if records:
        draw_log(out / CURVE, records)
    if not (out / MODEL).exists():
        save(model, out / MODEL, dtype=torch.bfloat16)
    if trained or not (out / SUMMARY).exists():  # a finished run has nothing better to say
        write_file(out / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    return validation


def validate(transformer: Transformer, text: Packed, recipe: Recipe, step: int) -> Validation:
    """Loss over the whole held-out text in windows of recipe.length, and every expert's load."""
    config = transformer.config
    total, count = 0.0, 0
    load = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.int64)
    device = transformer.backend.device()
    with torch.no_grad():
        for x, y in _windows(text.tokens, recipe):
            out = _forward(transformer, x.to(device), recipe)
            target = y.to(device).flatten()
            total += F.cross_entropy(out.logits.flatten(0, 1), target, reduction="sum").item()
            count += len(target)
            load += expert_load(out.routes, config.num_experts).cpu()
    share = load / load.double().mean(1, keepdim=True)
    return Validation(
        step=step,
        loss=total / count,
        bits_per_byte=total / count / math.log(2) * len(text.tokens) / text.bytes,
        busiest=share.amax(1).mean().item(),
        idlest=share.min().item(),
        load=[[round(v, 4) for v in row] for row in share.tolist()],
    )


def _windows(tokens: npt.NDArray[Any], recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    length = min(recipe.length, len(tokens) - 1)
    rows = torch.from_numpy(tokens.astype("int64"))
    for start in range(0, len(rows) - length, length * recipe.rows):
        span = min(recipe.rows, (len(rows) - 1 - start) // length) * length
        yield (
            rows[start : start + span].view(-1, length),
            rows[start + 1 : start + 1 + span].view(-1, length),
        )


def _forward(transformer: Transformer, x: Tensor, recipe: Recipe) -> Any:
    positions = torch.arange(x.shape[1], device=x.device).expand(x.shape)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.autocast):
        return transformer(x, positions, None)


def _step(
    transformer: Transformer, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, recipe: Recipe
) -> float:
    """One update; returns the cross-entropy in nats a token."""
    device = transformer.backend.device()
    out = _forward(transformer, x.to(device), recipe)
    loss = F.cross_entropy(out.logits.flatten(0, 1), y.to(device).flatten())
    balance = auxiliary_loss(out.router_logits, out.routes, transformer.config.router_aux_loss_coef)
    optimizer.zero_grad()
    (loss + balance).backward()
    nn.utils.clip_grad_norm_(transformer.parameters(), recipe.clip)
    optimizer.step()
    value = loss.item()
    if not math.isfinite(value):
        raise UserError(
            f"the loss is {value}; start again with a lower learning rate than {recipe.peak}"
        )
    return value


def _optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.dim() > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": recipe.decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak, betas=(0.9, 0.95), fused=True)


def _check_memory(config: Config, backend: Backend) -> None:
    """Refuses what the machine would kill: parameters, gradients and AdamW's two means take 16
    bytes a parameter, of which the host of another device holds the first 4.
    """
    if not hasattr(os, "sysconf"):  # on Windows nothing is known
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    count = config.count_parameters()[0]
    needed = count * (16 if backend.device().type == "cpu" else 4)
    if needed > memory:
        raise UserError(
            f"to train {count:,} parameters takes {needed / 2**30:,.1f} GiB, but this machine has "
            f"{memory / 2**30:,.1f} GiB of memory: take smaller sizes or another machine"
        )


def _check_folder(out: Path) -> None:
    """Refuses a folder that holds anything but a run, and clears it of what a kill in the middle of
    a write left there.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a new folder")
    files = "|".join(map(re.escape, (STATE, LOG, CURVE, SUMMARY, MODEL)))
    unfinished = re.compile(rf"\.({files})\.[0-9a-f]{{8}}")  # as `files.py` names them
    found = {path.name: path for path in out.iterdir()} if out.is_dir() else {}
    left = [name for name in found if unfinished.fullmatch(name)]
    # Before the first state there may be a log.
    if STATE not in found and found.keys() - {LOG, *left}:
        raise UserError(f"{out} is not empty and holds no {STATE} to go on from; name a new folder")
    for path in (found[name] for name in left):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _text(documents: list[Document]) -> str:
    return "\n".join(document.text for document in documents)


def _digest(documents: list[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.text.encode() + b"\0")
    return digest.hexdigest()


def _short(validation: Validation) -> dict[str, Any]:
    return {name: value for name, value in asdict(validation).items() if name != "load"}
