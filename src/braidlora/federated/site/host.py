"""One base model in memory, in which clients take turns to load, train and read their adapters."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from braidlora.config import FederatedConfig
from braidlora.errors import CheckpointError
from braidlora.federated.protocol.checks import listing
from braidlora.federated.protocol.client import Trained
from braidlora.federated.protocol.factors import AXES, AdaptedLayer, join, split
from braidlora.federated.protocol.recipe import make_rule
from braidlora.federated.protocol.rules import spec_of
from braidlora.federated.site import pair
from braidlora.federated.site.clients import Client
from braidlora.federated.site.group import Group
from braidlora.federated.site.local_training import train_locally
from braidlora.federated.site.orders import Loaded, Order
from braidlora.models.adapter_targets import fit_targets
from braidlora.models.attach import save_modules, wrap
from braidlora.models.base import check_cutoff, enable_gradient_checkpointing, load_base
from braidlora.models.identity import base_record
from braidlora.models.old_fingerprints import sampled_fingerprint
from braidlora.tasks import LabelSpace, MultiTaskDataset, check_packing, encode_tasks

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

_STACK = "carried"  # the adapter that holds them


class Host:
    """A frozen base model with one PEFT adapter per rank and scaling, into which clients' tensors are loaded.

    Under flora a second, frozen LoRA is active along with it: the stack that clients carry.

    Args:
        config: the recipe.
        label_space: of `classify` tasks.
        group: processes that train together, each with a host of its own; None: this one alone.

    Attributes:
        rule: the recipe's rule, which says what of an adapter is trained and what is sent.
        model, tokenizer: the PEFT model and the base's tokenizer.
        layers: the adapted layers.
        head: the initial tensors of modules that are trained in full (a classification head), by name.
        base: the record of the base model; `sampled` is its fingerprint as of braidlora 0.1.
    """

    def __init__(
        self, config: FederatedConfig, label_space: LabelSpace | None, group: Group | None = None
    ) -> None:
        self.config, self.label_space, self.group = config, label_space, group
        self._loaded: Loaded | None = None
        self.rule = make_rule(config)
        set_seed(config.seed)  # a classifier's head is drawn from the global generator
        base, self.tokenizer = load_base(config.model, label_space)
        check_cutoff(base, config)
        if config.prompt.packing:
            check_packing(base, config.prompt.cutoff)
        self.base, self.sampled = base_record(base, config.model), sampled_fingerprint(base)
        if config.training.gradient_checkpointing:
            enable_gradient_checkpointing(base)
        if torch.cuda.is_available() and config.model.quantization == "none":
            base.to("cuda")
        self._peft = client_config(config, base)
        self._slots: dict[tuple[int, float], dict[str, nn.Parameter]] = {}
        self._rows: dict[str, MultiTaskDataset] = {}
        self._active: tuple[int, float] | None = None
        first = (config.adapter.r, config.scaling)
        self.model: PeftModel = wrap(base, self.peft_config(*first), config.seed, _name(first))
        if self.rule.spec.adapter == "pair":
            pair.divide(self.model, _name(first))
        self._slots[first] = self._find_slots(first)
        if self.rule.spec.carried:
            self._add(_STACK, 1, 1.0)
        self._layers = [(name, module) for name, module in self.model.named_modules() if _is_adapted(module)]
        self.layers = [
            AdaptedLayer(name, module.out_features, module.in_features) for name, module in self._layers
        ]
        self.head = {
            name: slot.detach().cpu().clone()
            for name, slot in self._slots[first].items()
            if split(name)[1] not in AXES
        }
        self.rule = make_rule(config, self.head)

    def peft_config(self, rank: int, scaling: float) -> PeftConfig:
        """The PEFT configuration of a client of this rank and scaling."""
        config = copy.deepcopy(self._peft)
        config.r, config.lora_alpha = rank, alpha_of(rank, scaling)
        return config

    def rows(self, client: Client) -> MultiTaskDataset:
        """The client's training rows, encoded once."""
        if client.name not in self._rows:
            self._rows[client.name] = encode_tasks(
                client.tasks, self.tokenizer, self.config.prompt, "train", self.label_space
            )
        return self._rows[client.name]

    @torch.no_grad()
    def load(
        self,
        rank: int,
        scaling: float,
        tensors: Mapping[str, Tensor],
        trains: Collection[str] | None = None,
        frozen: Collection[str] = (),
    ) -> None:
        """Load a client's tensors into the model, and make its adapter active and trainable.

        Args:
            tensors: all of the adapter, by PEFT's names, and under flora the stack as `carried_A`, `carried_B`.
            trains: factors to train; default: all that the rule trains.
            frozen: names of tensors of the head that are not trained.

        Raises:
            CheckpointError: names or shapes do not fit; the model is unchanged.
        """
        form = (rank, scaling)
        if form not in self._slots:
            self._add(_name(form), rank, scaling)
            self._slots[form] = self._find_slots(form)
        slots = self._slots[form]
        spec = self.rule.spec
        own = {name: tensor for name, tensor in tensors.items() if split(name)[1] not in spec.carried}
        _check_fit(own, slots)
        if self._active != form:
            self.model.set_adapter(_name(form))
            self._active = form
        trains = spec.trains if trains is None else trains
        for name, slot in slots.items():
            factor = split(name)[1]
            slot.requires_grad_(factor in trains or (factor not in AXES and name not in frozen))
            slot.copy_(own[name])
        if spec.carried:
            self._carry(_name(form), tensors)
        if self.group is not None:
            self._loaded = Loaded(rank, scaling, tensors, trains, frozen)

    @torch.no_grad()
    def read(self) -> dict[str, Tensor]:
        """Copies of the active adapter's tensors, without the stack."""
        assert self._active is not None
        return {name: slot.detach().cpu().clone() for name, slot in self._slots[self._active].items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """The active adapter's parameters, by the names of its tensors."""
        assert self._active is not None
        return self._slots[self._active]

    def num_examples(self, client: Client) -> int:
        """How many training rows the client has."""
        return len(self.rows(client))

    def train(self, client: Client, round: int, seed: int, optimizer: Mapping[str, Tensor]) -> Trained:
        """Train the active adapter on the client's rows; arguments and errors as in `train_locally`."""
        if self.group is None:
            return train_locally(self, client, round, seed, optimizer)
        if self.group.leads:
            assert self._loaded is not None
            self.group.send(Order(client.name, round, seed, self._loaded, optimizer).pack())
            with self.group.together():  # the others load the same
                pass
        with self.group.together():
            return train_locally(self, client, round, seed, optimizer)

    def _add(self, name: str, rank: int, scaling: float) -> None:
        config = self.peft_config(rank, scaling)
        if name == _STACK:
            config.modules_to_save, config.lora_dropout = None, 0.0
        devices = list(range(torch.cuda.device_count()))
        with torch.random.fork_rng(devices=devices):  # what is drawn here is overwritten
            self.model.add_adapter(name, config)
            if self.rule.spec.adapter == "pair":
                pair.divide(self.model, name)

    def _find_slots(self, form: tuple[int, float]) -> dict[str, nn.Parameter]:
        """The parameters of an adapter, by the names that PEFT gives its tensors in a state dict."""
        own = {}
        for name, parameter in self.model.named_parameters():
            if f".{_name(form)}." in name:
                plain = name.replace(f".modules_to_save.{_name(form)}.", ".")
                own[pair.tensor_name(plain.replace(f".{_name(form)}.", "."))] = parameter
        return own

    def _carry(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        for layer, module in self._layers:
            # PEFT makes the stack trainable whenever it is activated along with the client's adapter.
            module.set_adapter([name, _STACK])
            for carried, factors, empty in (
                ("carried_A", module.lora_A, (0, module.in_features)),
                ("carried_B", module.lora_B, (module.out_features, 0)),
            ):
                device = factors[name].weight.device
                stack = tensors.get(join(layer, carried), torch.zeros(empty)).to(device)
                factors[_STACK].weight = nn.Parameter(stack, requires_grad=False)


def alpha_of(rank: int, scaling: float) -> float:
    """lora_alpha = s·r of a rank and a scaling: an int if it is a whole number, as in PEFT's own files."""
    alpha = scaling * rank
    whole = round(alpha)
    return whole if math.isclose(alpha, whole, rel_tol=1e-12) else alpha


def client_config(config: FederatedConfig, base: Any) -> PeftConfig:
    """The PEFT configuration of all clients' adapters on this base, except rank and alpha.

    Raises:
        ConfigError: the target modules or the modules to save do not fit the base.
    """
    from peft import LoraConfig

    from braidlora.adapters import FactoredLoraConfig

    adapter, federation = config.adapter, config.federation
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM" if config.kind == "generate" else "SEQ_CLS",
        "lora_dropout": adapter.lora_dropout,
        "modules_to_save": list(adapter.modules_to_save) if adapter.modules_to_save else None,
    }
    form = spec_of(federation.rule).adapter
    made: Any
    if form == "factored":
        made = FactoredLoraConfig(r_intermediate=federation.r_intermediate, **common)
    elif form == "pair":
        made = pair.pair_config(**common)
    else:
        made = LoraConfig(**common)
    fit_targets(made, base, adapter.target_modules)
    save_modules(base, made)
    made.base_model_name_or_path, made.revision = base.name_or_path, config.model.revision
    return made


def _name(form: tuple[int, float]) -> str:
    """Name of the adapter of a rank and a scaling; PEFT allows no dot in it.

    17 digits tell any two numbers apart: alpha / rank of clients that mean the same scaling may differ in the last one.
    """
    return f"rank{form[0]}_scaling{form[1]:.17g}".replace(".", "_")


def _is_adapted(module: nn.Module) -> bool:
    from braidlora.adapters._peft_compat import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _check_fit(tensors: Mapping[str, Tensor], slots: Mapping[str, nn.Parameter]) -> None:
    problems = []
    if missing := sorted(slots.keys() - tensors.keys()):
        problems.append(f"missing: {listing(missing)}")
    if foreign := sorted(tensors.keys() - slots.keys()):
        problems.append(f"not in this model: {listing(foreign)}")
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(slots[name].shape)}"
        for name in sorted(slots.keys() & tensors.keys())
        if tensors[name].shape != slots[name].shape
    ]
    if problems:
        raise CheckpointError("a client's tensors do not fit the model: " + "; ".join(problems))
