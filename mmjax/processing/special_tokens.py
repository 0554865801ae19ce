"""The special and the added tokens of a tokenizer, as the files of its folder tell of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from mmjax.errors import InputError
from mmjax.json_files import find_json
from mmjax.processing.vocabularies import TokenizerFiles

# Tokens with a role, in the order in which `transformers` adds those that a vocabulary lacks.
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens that are found in a text before anything else is done to it."""

    roles: Mapping[str, AddedToken]  # by role: 'pad', 'cls', …
    others: tuple[AddedToken, ...]  # more special tokens
    added: tuple[AddedToken, ...]  # all that the files number, in that order
    folder: Path

    @classmethod
    def read(
        cls, files: TokenizerFiles, usual: Mapping[str, str], **flags: bool
    ) -> "SpecialTokens":
        """Reads `tokenizer_config.json` and, in older folders, its companions.

        Args:
          files: the files of the folder.
          usual: how the class spells its tokens, by role, where the files do not.
          **flags: of tokens with a role, where only their spelling is known.

        Raises:
          InputError: something else than a token stands in the place of one.
        """
        config: dict[str, Any] = dict(files.config)
        origin = str(files.folder / "tokenizer_config.json")
        if "added_tokens_decoder" in config:
            added = _numbered(config["added_tokens_decoder"], origin)
        else:
            config |= find_json(files.folder / "special_tokens_map.json") or {}
            added = _companions(files, config)
        others = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        if isinstance(others, dict):
            config |= {f"{name.removesuffix('_token')}_token": t for name, t in others.items()}
            others = []
        known = {token.content: token for token in added}
        roles = {}
        for role in [*_ROLES, *_more_roles(config)]:
            value = config.get(f"{role}_token", usual.get(role))
            if value is not None:
                token = _token(value, origin, **flags)
                roles[role] = _special(known.get(token.content, token))
        return cls(roles, tuple(_token(token, origin) for token in others), added, files.folder)

    def spelled(self) -> dict[str, str]:
        """The tokens with a role, as the vocabulary spells them."""
        return {role: token.content for role, token in self.roles.items()}

    def all(self) -> list[AddedToken]:
        """Every token once, in the order in which the missing ones get their ids."""
        special = {token.content: token for token in self.roles.values()}
        tokens: dict[str, AddedToken] = {}
        for token in (*self.added, *self.roles.values(), *self.others):
            tokens.setdefault(token.content, special.get(token.content, token))
        return list(tokens.values())

    def with_others(self, others: Iterable[AddedToken]) -> "SpecialTokens":
        """The same with these for the more special tokens."""
        return replace(self, others=tuple(others))

    def add_to(self, tokenizer: Tokenizer) -> None:
        """Makes them known to a tokenizer; those that it knows already stay as they are.

        Raises:
          InputError: a new token got an id that is taken.
        """
        present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_tokens([token for token in self.all() if token.content not in present])
        numbered = tokenizer.get_added_tokens_decoder()
        for token in self.all():
            i = tokenizer.token_to_id(token.content)
            other = None if i is None else numbered.get(i)
            if other is not None and other.content != token.content:
                raise InputError(
                    f"{self.folder}: the id {i} would stand for {token.content!r} and for "
                    f"{other.content!r}: the ids of the vocabulary do not run without a gap."
                )


def _numbered(content: Any, origin: str) -> tuple[AddedToken, ...]:
    """The tokens of an `added_tokens_decoder`, by id."""
    if not isinstance(content, dict) or not all(i.isdecimal() for i in content):
        raise InputError(f"{origin}: added_tokens_decoder holds tokens by their ids.")
    return tuple(_token(content[i], origin) for i in sorted(content, key=int))


def _companions(files: TokenizerFiles, config: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    """The tokens of `added_tokens.json` and of `tokenizer.json`, by id."""
    origin = str(files.folder / "added_tokens.json")
    spelled = {_token(v, origin).content for key, v in config.items() if _is_role(key, v)}
    tokens = {}
    for content, i in (find_json(files.folder / "added_tokens.json") or {}).items():
        tokens[i] = AddedToken(content, special=content in spelled)
    origin = str(files.folder / "tokenizer.json")
    for token in (files.tokenizer or {}).get("added_tokens") or []:
        tokens[token.get("id")] = _token(token, origin)
    if not all(isinstance(i, int) for i in tokens):
        raise InputError(f"{origin}: an added token has no number for an id.")
    return tuple(tokens[i] for i in sorted(tokens))


def _more_roles(config: Mapping[str, Any]) -> list[str]:
    """Roles that only some models have: any other key in `…_token` that holds a token."""
    roles = (key.removesuffix("_token") for key, value in config.items() if _is_role(key, value))
    return [role for role in roles if role not in _ROLES]


def _is_role(key: str, value: Any) -> bool:
    return key.endswith("_token") and isinstance(value, str | dict)


def _token(value: Any, origin: str, **flags: bool) -> AddedToken:
    """A token as a file writes it: its spelling, which makes it special, or that and its flags."""
    if isinstance(value, str):
        return AddedToken(value, **{"special": True, **flags})
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise InputError(
            f"{origin}: a special token is a text, or an object with a content, not {value!r}."
        )
    stated = {flag: value[flag] for flag in _FLAGS if flag in value}
    if not all(isinstance(flag, bool) for flag in stated.values()):
        raise InputError(f"{origin}: flags of {value['content']!r} are true or false: {stated}.")
    return AddedToken(value["content"], **stated)


def _special(token: AddedToken) -> AddedToken:
    """The token, and special."""
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )
