"""One training run: an arm, its learning rates and a seed."""

import copy
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

import weightnorm as wn
from weightnorm.compare.arms import Arm
from weightnorm.compare.average import Average
from weightnorm.compare.models import initial_model, module_form
from weightnorm.compare.step import Recorded
from weightnorm.optim import WeightNormOptimizer
from weightnorm.tasks.task import Task

Form = Literal["optimizer", "module"]
Precision = Literal["fp32", "bf16"]


class Setting(NamedTuple):
    """What a grid varies: the learning rate and, where there is weight normalization, the factor on that of lengths."""

    lr: float
    g_lr: float | str | None = None

    def __str__(self) -> str:
        return f"{self.lr:g}" if self.g_lr is None else f"{self.lr:g}, g x {self.g_lr}"


@dataclass(frozen=True)
class Epoch:
    """What one epoch measured.

    Attributes:
        step_loss: the training loss at every step, in training mode, before that step.
        train: the task's measures, by name: their means over the epoch, likewise.
        test: the same on held-out data after the epoch, in eval mode.
        seconds: what training took, evaluation apart.
    """

    step_loss: list[float]
    train: dict[str, float]
    test: dict[str, float]
    seconds: float


@dataclass
class Run:
    """One model in training, with a random state of its own: what runs in between changes nothing.

    Attributes:
        task: what is trained.
        arm: how.
        setting: its learning rates.
        seed: decides initial weights and the order of the data; the same in every arm.
        total: how many epochs it is to train, for the task's schedule.
        form: where weight normalization is, in the "optimizer" or in the "module".
        precision: "bf16": forward and backward under autocast; weights and optimizer stay float32.
        epochs: what was measured so far.
        finals: what is measured when all epochs are done, by name.
    """

    task: Task
    arm: Arm
    setting: Setting
    seed: int
    total: int
    form: Form = "optimizer"
    precision: Precision = "fp32"
    epochs: list[Epoch] = field(default_factory=list)
    finals: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random_state: list[torch.Tensor] = []
        with self._own_random_state():
            self.model = initial_model(self.task, self.arm, self.seed)
        lr, g_lr = self.setting
        if g_lr is None:
            self.optimizer = self.task.optimizer(self.model.parameters(), lr)
        elif self.form == "module":
            self.optimizer = self.task.optimizer(module_form(self.model, self.task.v_std, lr, g_lr), lr)
        else:
            self.optimizer = self.task.weight_norm_optimizer(self.model, lr, g_lr)
        span = self.task.average_epochs
        self._average = Average(self.model, span, self.task.steps_per_epoch) if span else None
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._records = self.task.device.type == "cuda"
        self._prepare_step()

    @property
    def diverged(self) -> bool:
        """Say whether the loss is no longer a finite number."""
        return bool(self.epochs) and not math.isfinite(self.epochs[-1].train["loss"])

    @property
    def scored(self) -> nn.Module:
        """Return the model that is scored: of the average of the weights, if the task has one."""
        return self._average.model if self._average else self.model

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes in training, but for what was measured."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self._random_state,
            "average": self._average and self._average.model.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._random_state = list(state["random"])
        if self._average:
            self._average.model.load_state_dict(state["average"])
        self._prepare_step()  # the optimizer's state lies elsewhere now

    @property
    def latest(self) -> str:
        """Return how well it does, for a progress bar."""
        return f"loss {self.epochs[-1].train['loss']:.4f}"

    def saved(self) -> dict[str, Any]:
        """Return the run in plain types and tensors."""
        epochs = [asdict(epoch) for epoch in self.epochs]
        return {"epochs": epochs, "finals": self.finals, "state": self.state_dict()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what ``saved`` returned."""
        self.epochs = [Epoch(**epoch) for epoch in saved["epochs"]]
        self.finals = dict(saved["finals"])
        self.load_state_dict(saved["state"])

    def train_epoch(self) -> None:
        """Train one more epoch, score the model and record both; interrupted, the run is as it was before."""
        before = copy.deepcopy(self.state_dict())
        try:
            with self._own_random_state():
                start = self._now()
                measured = self._train()
                seconds = self._now() - start
                epoch = self._summed_up(measured, seconds)
                if len(self.epochs) + 1 == self.total and math.isfinite(epoch.train["loss"]):
                    with self._cast():
                        finals = dict(self.task.finish(self.scored))
                else:
                    finals = {}
        except BaseException:
            self.load_state_dict(before)
            raise
        self.epochs.append(epoch)
        self.finals = finals

    def pictures(self) -> Mapping[str, torch.Tensor]:
        """Return what the model draws, from the same random numbers in every arm; training does not notice."""
        with self._forked(), self._cast(), torch.no_grad():
            torch.manual_seed(self.seed)
            return self.task.pictures(self.scored.eval())

    def _train(self) -> torch.Tensor:
        """Train an epoch; return all measures at every step, shape (measures, steps)."""
        self.model.train()
        self._follow_schedule()
        measured = []
        for batch in self.task.train_batches(self.seed, len(self.epochs)):
            measured.append(self._step(*batch))  # read at the end: a GPU need not wait
            if self._average:
                self._average.update(len(self.epochs))
        return torch.stack(measured, dim=1)

    def _summed_up(self, measured: torch.Tensor, seconds: float) -> Epoch:
        """Return what an epoch measured, with the scores of the model after it."""
        model = self.scored.eval()
        with self._cast():
            scores = self.task.evaluate(model)
        curves = dict(zip(self.task.measures, measured.tolist(), strict=True))
        train = {name: sum(curve) / len(curve) for name, curve in curves.items()}
        return Epoch(curves["loss"], train, dict(zip(self.task.measures, scores, strict=True)), seconds)

    def _take_step(self, *batch: torch.Tensor) -> torch.Tensor:
        """Take one training step; return all measures."""
        self.optimizer.zero_grad()
        with self._cast():
            loss, *others = self.task.loss(self.model, batch)
        loss.backward()
        self._clip()
        self.optimizer.step()
        return torch.stack([loss, *others]).detach()  # or it would keep all that led to it

    def _clip(self) -> None:
        if self.task.max_norm is None:
            return
        if isinstance(self.optimizer, WeightNormOptimizer):
            wn.clip_grad_norm_(self.optimizer, self.task.max_norm)
        else:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.task.max_norm)

    def _prepare_step(self) -> None:
        self._step = Recorded(self._take_step) if self._records else self._take_step
        if self._records:
            for group in self.optimizer.param_groups:
                # Where a recorded step reads it.
                group["lr"] = torch.tensor(float(group["lr"]), device=self.task.device)
                group["capturable"] = True

    def _cast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.task.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _follow_schedule(self) -> None:
        now = self.task.schedule(len(self.epochs), self.total)
        before = [group.get("betas") for group in self.optimizer.param_groups]
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate * now.lr)
            else:
                group["lr"] = rate * now.lr
            if now.betas:
                group["betas"] = now.betas
        if before != [group.get("betas") for group in self.optimizer.param_groups]:
            self._prepare_step()  # they are part of what was recorded

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """Put this run's random state in place of the program's, and back."""
        device = self.task.device
        with self._forked():
            if self._random_state:
                _set_random_state(device, self._random_state)
            yield
            self._random_state = _random_state(device)

    def _forked(self) -> AbstractContextManager[None]:
        return torch.random.fork_rng([self.task.device] if self.task.device.type == "cuda" else [])

    def _now(self) -> float:
        """Return the time in seconds, when all the work given to the device is done."""
        if self.task.device.type == "cuda":
            torch.cuda.synchronize(self.task.device)
        return time.perf_counter()


def _random_state(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(device: torch.device, states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
