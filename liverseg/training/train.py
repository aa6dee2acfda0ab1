"""The trainer: epochs of steps, validation, checkpoints, history."""

from __future__ import annotations

import copy
import csv
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_cache.errors import ConfigError, RunError
from data_cache.files import write_text
from data_cache.reader import CacheStore
from data_cache.schema import CaseMeta
from liverseg.inference.figures import progress_figure, save
from liverseg.model.inputs import class_fractions, decide, network_input
from liverseg.model.losses import loss as loss_of
from liverseg.model.network import UNet
from liverseg.training.augment import augment
from liverseg.training.checkpoint import (
    BEST,
    LAST,
    TrainState,
    load_checkpoint,
    restore,
    save_checkpoint,
    update_average,
)
from liverseg.training.config import OptimConfig, Precision, TrainConfig, save_config
from liverseg.training.split import SPLIT, Split, load_split, make_split, save_split
from liverseg.training.stream import Batch, Draw, Prefetch, Volumes, epoch_draws

HISTORY = "history.csv"
CONFIG = "config.toml"
PROGRESS = "progress.png"

Row = dict[str, "float | None"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watcher:
    """What is called while training runs; the command line draws a live line with it."""

    started: Callable[[str], None]
    stepped: Callable[[int, int, float], None]  # epoch, step within it, samples a second
    finished_epoch: Callable[[Row], None]


def train(store: CacheStore, run: Path, config: TrainConfig, *, resume: bool, watcher: Watcher) -> TrainState:
    """Train a network on the cases of ``store`` and keep everything in ``run``.

    Args:
        store: The cache.
        run: Folder of the run: config.toml, split.json, last.pt, best.pt, history.csv, progress.png.
        config: What to do; ``optim.epochs`` counts from the beginning also when resuming.
        resume: Continue from ``last.pt``, or start if there is none yet.
        watcher: Told about progress.

    Raises:
        RunError: ``run`` holds a run already, its checkpoint does not fit, or the loss is not finite.
        ConfigError: The device or a named case does not exist.
    """
    split = _open_run(store, run, config, resume=resume)
    device = choose_device(config.device)
    trainer = _Trainer(store, split, config, device)
    if resume and (run / LAST).exists():
        content = load_checkpoint(run / LAST)
        restore(trainer.state, content, config, path=run / LAST)
    watcher.started(trainer.description())
    while trainer.state.epoch < config.optim.epochs:
        row = trainer.run_epoch(watcher)
        _keep(run, trainer.state, store, config)
        watcher.finished_epoch(row)
    return trainer.state


def _open_run(store: CacheStore, run: Path, config: TrainConfig, *, resume: bool) -> Split:
    if not resume and (run / LAST).exists():
        raise RunError(f"{run}: holds a run already: add --resume to continue it, or name another folder")
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, run / CONFIG)
    if resume and (run / SPLIT).exists():
        split = load_split(run)
        missing = sorted({*split.train, *split.val} - set(store.case_ids))
        if missing:
            raise RunError(f"{store.path}: lacks {', '.join(missing)}, which {run} was started with")
        return split
    split = make_split(store, config.data, seed=config.seed)
    save_split(split, run)
    return split


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes CUDA if there is any, else the CPU.

    Raises:
        ConfigError: The name means nothing, or there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as failure:
        reason = str(failure).splitlines()[0]
        raise ConfigError(f"device {name!r}: not available ({reason}): use auto or cpu") from None
    return device


def computes_in_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether autocast to bfloat16 is on: as asked, or where the hardware multiplies it natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def learning_rate(step: int, config: OptimConfig) -> float:
    """Of a step (counted from 0): linear warm-up, then half a cosine down to zero."""
    total = config.epochs * config.steps_per_epoch
    warmup = min(config.warmup_steps, total // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


class _Trainer:
    """Wires the parts of a run together; what changes is in ``state``."""

    def __init__(self, store: CacheStore, split: Split, config: TrainConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.split = split
        self.metas = [store.meta(case_id) for case_id in split.train]
        self.volumes = Volumes(store, split.train, resident=config.data.resident, device=device)
        self.val_volumes = Volumes(store, split.val, resident=config.data.resident, device=device)
        self.views = {case_id: tuple(store.meta(case_id).windows) for case_id in split.val}
        self.autocast = computes_in_bf16(config.precision, device)
        self.state = new_state(config, device, class_shares=class_shares(self.metas))

    def description(self) -> str:
        """One line on what is about to run."""
        parameters = sum(p.numel() for p in self.state.network.parameters())
        return (
            f"{len(self.split.train)} training and {len(self.split.val)} validation cases, "
            f"{self.volumes.size_bytes / 2**20:.0f} MiB kept in the {self.volumes.place}; "
            f"{parameters:,} parameters on {self.device} in {'bf16' if self.autocast else 'fp32'}"
        )

    def run_epoch(self, watcher: Watcher) -> Row:
        """One epoch and its validation; appends the row to the history."""
        start = time.perf_counter()
        train_loss, waited_s = self._train_epoch(watcher)
        seconds = time.perf_counter() - start
        val_loss, dice = self._validate()
        row: Row = {
            "epoch": self.state.epoch + 1,
            "step": self.state.step,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "val_dice_liver": dice[0],
            "val_dice_tumour": dice[1],
            "learning_rate": learning_rate(self.state.step - 1, self.config.optim),
            "samples_per_second": self.config.optim.steps_per_epoch * self.config.optim.batch_size / seconds,
            "wait_share": waited_s / seconds,
            "seconds": time.perf_counter() - start,
        }
        self.state.epoch += 1
        self.state.history.append(row)
        return row

    def _train_epoch(self, watcher: Watcher) -> tuple[float, float]:
        optim, state = self.config.optim, self.state
        # All chance of an epoch follows from seed and epoch: resuming needs no generator's state.
        rng = np.random.default_rng([self.config.seed, state.epoch])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        torch.manual_seed(int(rng.integers(2**62)))  # dropout draws from the global generator
        draws = epoch_draws(
            self.metas, self.config.data, count=optim.steps_per_epoch * optim.batch_size, rng=rng
        )
        batches = Prefetch(list(_chunks(draws, optim.batch_size)), self.volumes.fetch)
        state.network.train()
        total = torch.zeros((), device=self.device)
        start = time.perf_counter()
        for step, batch in enumerate(batches, 1):
            value = self._step(batch, generator)
            total += value
            if not torch.isfinite(value):
                raise RunError(
                    f"the loss is {value.item()} in epoch {state.epoch + 1}, step {step}, on cases "
                    f"{', '.join(batch.case_ids)}: look at them, or lower optim.learning_rate"
                )
            rate = step * optim.batch_size / (time.perf_counter() - start)
            watcher.stepped(state.epoch + 1, step, rate)
        return total.item() / optim.steps_per_epoch, batches.waited_s

    def _step(self, batch: Batch, generator: torch.Generator) -> Tensor:
        state, config = self.state, self.config
        image, fractions = augment(
            network_input(batch.image_bczyx, config.input),
            class_fractions(batch.fractions_bczyx),
            config.augment,
            windows_b2=batch.windows_b2,
            generator=generator,
        )
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, config.optim)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = state.network(image.contiguous(memory_format=torch.channels_last_3d))
        value = levels_loss(logits, fractions, config)
        state.optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(state.network.parameters(), config.optim.clip_norm)
        state.optimizer.step()
        state.step += 1
        update_average(state.average, state.network, decay=config.optim.ema_decay, step=state.step)
        return value.detach()

    @torch.no_grad()
    def _validate(self) -> tuple[float, tuple[float, float | None]]:
        """Loss and mean Dice per class of the averaged weights, over the validation cases one by one."""
        network = self.state.average.eval()
        losses, scores = [], []
        for case_id, views in self.views.items():
            view = "liver" if "liver" in views else "scan"
            batch = self.val_volumes.fetch([Draw(case_id=case_id, view=view, window=(0.0, 1.0))])
            image = network_input(batch.image_bczyx, self.config.input)
            fractions = class_fractions(batch.fractions_bczyx)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                logits = network(image.contiguous(memory_format=torch.channels_last_3d))
            losses.append(loss_of(logits, fractions, self.config.loss).item())
            predicted = decide(torch.softmax(logits.float(), dim=1)[:, 1:])
            scores.append(cached_dice(predicted, decide(fractions[:, 1:])))
        liver, tumour = (np.array(s, dtype=float) for s in zip(*scores, strict=True))
        tumours = tumour[~np.isnan(tumour)]
        return float(np.mean(losses)), (
            float(np.nanmean(liver)) if not np.isnan(liver).all() else 0.0,
            float(tumours.mean()) if tumours.size else None,
        )


def new_state(
    config: TrainConfig, device: torch.device, *, class_shares: tuple[float, ...] | None = None
) -> TrainState:
    """A network with the weights that the seed gives, and its optimizer.

    With ``class_shares`` the untrained network answers with them everywhere (Lin et al. 2017,
    arXiv:1708.02002, section 4.1): it need not first unlearn that a third of all voxels are tumour. On
    phantoms the liver's Dice passed 0.8 after 100 steps instead of 190.
    """
    torch.manual_seed(config.seed)
    network = UNet(config.model).to(device)
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if class_shares is not None:
        for head in network.heads:
            with torch.no_grad():
                head.bias.copy_(torch.tensor(class_shares).log())
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=config.optim.learning_rate,
        weight_decay=config.optim.weight_decay,
        fused=device.type == "cuda",
    )
    return TrainState(network=network, average=average, optimizer=optimizer)


def class_shares(metas: Sequence[CaseMeta]) -> tuple[float, float, float]:
    """Shares of background, liver and tumour in the liver views of some cases; none is below 1e-4."""
    counts = np.zeros(3)
    for meta in metas:
        if meta.voxel_counts is None:
            continue
        window = meta.windows.get("liver", meta.windows["scan"])
        _, liver, tumour = meta.voxel_counts
        voxels = len(window) * meta.grid.shape_zyx[1] * meta.grid.shape_zyx[2]
        counts += (voxels - liver - tumour, liver, tumour)
    background, liver, tumour = np.maximum(counts / max(counts.sum(), 1.0), 1e-4).tolist()
    return background, liver, tumour


def levels_loss(logits: Tensor | tuple[Tensor, ...], fractions_bczyx: Tensor, config: TrainConfig) -> Tensor:
    """The loss; with deep supervision the mean over levels, each weighing half of the next finer one.

    Fractions are averaged down to a coarser level's voxels exactly, which ids could not be.
    """
    if isinstance(logits, Tensor):
        return loss_of(logits, fractions_bczyx, config.loss)
    weights = [0.5**level for level in range(len(logits))]
    losses = [
        loss_of(level_logits, F.avg_pool3d(fractions_bczyx, 2**level), config.loss)
        for level, level_logits in enumerate(logits)
    ]
    return torch.stack([w * v for w, v in zip(weights, losses, strict=True)]).sum() / sum(weights)


def cached_dice(predicted_1zyx: Tensor, truth_1zyx: Tensor) -> tuple[float, float]:
    """Dice of liver (with its tumours) and of tumour on the cached grid; NaN where the truth has none."""
    scores = []
    for label in (1, 2):
        p, t = predicted_1zyx >= label, truth_1zyx >= label
        size = int(t.sum())
        scores.append(2 * int((p & t).sum()) / (int(p.sum()) + size) if size else math.nan)
    return scores[0], scores[1]


def selection_score(row: Row) -> float:
    """What ``best.pt`` is best by: the mean Dice of the classes that the validation cases have."""
    scores = [row["val_dice_liver"], row["val_dice_tumour"]]
    return float(np.mean([s for s in scores if s is not None]))


def _chunks(draws: Sequence[Draw], size: int) -> Iterator[Sequence[Draw]]:
    return (draws[i : i + size] for i in range(0, len(draws), size))


def _keep(run: Path, state: TrainState, store: CacheStore, config: TrainConfig) -> None:
    """History, curves and checkpoints of the epoch that has just ended."""
    score = selection_score(state.history[-1])
    is_best = score > state.best_score
    state.best_score = max(score, state.best_score)
    if is_best:
        save_checkpoint(run / BEST, state, config, store.schema.spec)
    save_checkpoint(run / LAST, state, config, store.schema.spec)
    _write_history(run / HISTORY, state.history)
    columns = {key: [_number(row[key]) for row in state.history] for key in state.history[0]}
    save(progress_figure(columns), run / PROGRESS)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _write_history(path: Path, history: Sequence[Row]) -> None:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=list(history[0]))
    writer.writeheader()
    writer.writerows(history)
    write_text(path, table.getvalue())
