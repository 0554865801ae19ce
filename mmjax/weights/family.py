"""What there is to know of a family to read and write its weights."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from flax import nnx

from mmjax.models.model import Model
from mmjax.weights.names import Table


@dataclass(frozen=True)
class Source:
    """A description to be read: a config.json, the tensors beside it, and where they are."""

    json: Mapping[str, Any]
    names: Collection[str]  # of the tensors
    origin: str  # of the config.json, for messages

    def has(self, *suffixes: str) -> bool:
        """Whether the names of some tensors end so: heads are told by their weights."""
        return all(any(name.endswith(suffix) for name in self.names) for suffix in suffixes)


@dataclass(frozen=True)
class Family:
    """How one family lies on disk.

    Attributes:
      name: `model_type` of its config.json; for a family without one, what `family=` names.
      model: the class of the model, called with a config and random streams.
      config: the dataclass of that config.
      table: the names of the parameters of a model with that config.
      read: our config out of what is on disk; None where the original code stored none.
      write: the config.json of our config; None where `transformers` has no such class.
      is_member: whether a config of the right dataclass is of this family.
      prefix: of all names there, that some classes write and others leave out.
      tied: names there that repeat another tensor, which may be absent; -> that tensor. Where they
        depend on the config, a function of it.
      unused: names there that are no weights of the model, as regular expressions.
    """

    name: str
    model: Callable[..., Model]
    config: type
    table: Callable[[Any], Table]
    read: Callable[[Source], Any] | None = None
    write: Callable[[Any], dict[str, Any]] | None = None
    is_member: Callable[[Any], bool] = lambda config: True
    prefix: str = ""
    tied: Mapping[str, str] | Callable[[Any], Mapping[str, str]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def tied_in(self, config: Any) -> Mapping[str, str]:
        """The repeated tensors of a model with that config."""
        return self.tied(config) if callable(self.tied) else self.tied

    def abstract(self, config: Any) -> Any:
        """Shapes and types of the parameters of a model with that config, a nested dict."""
        model = nnx.eval_shape(lambda: self.model(config, nnx.Rngs(0)))
        return nnx.to_pure_dict(nnx.state(model))
