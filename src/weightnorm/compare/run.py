"""One training run: an arm, its learning rates and a seed."""

import copy
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from weightnorm.compare.arms import Arm
from weightnorm.compare.models import initial_model, module_form
from weightnorm.compare.step import Recorded
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
        train_error: mean over the epoch, likewise, in percent.
        test_loss: on held-out data after the epoch, in eval mode.
        test_error: likewise, in percent.
        seconds: what training took, evaluation apart.
    """

    step_loss: list[float]
    train_error: float
    test_loss: float
    test_error: float
    seconds: float

    @property
    def train_loss(self) -> float:
        """Return the mean training loss over the epoch."""
        return sum(self.step_loss) / len(self.step_loss)


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
    """

    task: Task
    arm: Arm
    setting: Setting
    seed: int
    total: int
    form: Form = "optimizer"
    precision: Precision = "fp32"
    epochs: list[Epoch] = field(default_factory=list)

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
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._records = self.task.device.type == "cuda"
        self._prepare_step()

    @property
    def diverged(self) -> bool:
        """Say whether the loss is no longer a finite number."""
        return bool(self.epochs) and not math.isfinite(self.epochs[-1].train_loss)

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes in training, but for ``epochs``."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self._random_state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._random_state = list(state["random"])
        self._prepare_step()  # the optimizer's state lies elsewhere now

    def train_epoch(self) -> None:
        """Train one more epoch, score the model and record both; interrupted, the run is as it was before."""
        before = copy.deepcopy(self.state_dict())
        try:
            with self._own_random_state():
                start = self._now()
                measured = self._train()
                seconds = self._now() - start
                self.model.eval()
                with self._cast():
                    scores = self.task.evaluate(self.model)
        except BaseException:
            self.load_state_dict(before)
            raise
        step_loss, wrong = measured.tolist()
        train_error = 100 * sum(wrong) / len(wrong)
        self.epochs.append(Epoch(step_loss, train_error, scores.loss, scores.error, seconds))

    def _train(self) -> torch.Tensor:
        """Train an epoch; return loss and share of wrong answers at every step, shape (2, steps)."""
        self.model.train()
        self._follow_schedule()
        measured = []
        for batch in self.task.train_batches(self.seed, len(self.epochs)):
            measured.append(self._step(*batch))  # read at the end: a GPU need not wait
        return torch.stack(measured, dim=1)

    def _take_step(self, *batch: torch.Tensor) -> torch.Tensor:
        """Take one training step; return its loss and share of wrong answers."""
        self.optimizer.zero_grad()
        with self._cast():
            loss, wrong = self.task.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        return torch.stack([loss.detach(), wrong])

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
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if self._random_state:
                _set_random_state(device, self._random_state)
            yield
            self._random_state = _random_state(device)

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
