"""A conversation in a tar: KEY.json beside KEY.jpg, or beside KEY.0.jpg, KEY.1.jpg, … where it shows several.

The json holds `conversations` or `messages`; picture n belongs to the n-th place for one in its texts.
"""

import re
from collections.abc import Collection
from typing import Any

from vlm.data.image import BadSample
from vlm.data.record import Record, name_fault
from vlm.data.talk import COLUMNS, MAX_PICTURES, Talk, read_talk
from vlm.data.tar import Group


class TalkRecord(Record):
    """As `Record`, for conversations: pictures go by their numbers, "0" is also the one without a number.

    A sample without a conversation has captions as those of `Record` have.
    """

    def __init__(self, image: str, caption: str, id_field: str | None = None) -> None:
        """As of `Record`."""
        super().__init__(image, caption, id_field)
        self._suffixes = self.images
        self._numbered = re.compile(rf"(\d{{1,9}})\.({'|'.join(map(re.escape, self.images))})")
        self.images = [str(number) for number in range(MAX_PICTURES)]
        self.columns = {name: i for i, name in enumerate([*self.images, *self.texts_in])}

    @property
    def what(self) -> str:
        """What a sample must have, for messages."""
        return "a conversation"

    @property
    def kinds(self) -> list[str]:
        """What decides which members are pictures."""
        return ["talks", *self._suffixes]

    def fault(self, group: Group) -> str:
        """As of `Record`; a picture is not needed."""
        if group.fault:
            return group.fault
        if not any(suffix in group.members for suffix in self.texts_in):
            return "dotted name" if self.dotted(group) else "no conversation"
        numbers = [int(found[1]) for suffix in group.members if (found := self._numbered.fullmatch(suffix))]
        if numbers and max(numbers) >= MAX_PICTURES:
            return "too many pictures"
        if set(range(max(numbers, default=-1))) - set(numbers):
            return "picture missing"
        return name_fault(group.key)

    def dotted(self, group: Group) -> list[str]:
        """As of `Record`; a number is no part of the name."""
        return [
            suffix
            for suffix in group.members
            if "." in suffix
            and not self._numbered.fullmatch(suffix)
            and suffix.rpartition(".")[2] in (*self._suffixes, *self.texts_in)
        ]

    def members(self, group: Group) -> dict[str, tuple[int, int]]:
        """By number and by suffix."""
        found = {suffix: place for suffix, place in group.members.items() if suffix in self.texts_in}
        for suffix in self._suffixes:
            if suffix in group.members:
                found.setdefault("0", group.members[suffix])
        for suffix, place in group.members.items():
            if numbered := self._numbered.fullmatch(suffix):
                found[str(int(numbered[1]))] = place
        return found

    def knows(self, suffix: str) -> bool:
        """Whether members of this suffix are of any use."""
        return suffix in (*self._suffixes, *self.texts_in) or self._numbered.fullmatch(suffix) is not None

    def pictures(self, names: Collection[str]) -> list[str]:
        """All of them, by number."""
        return [number for number in self.images if number in names]

    def talk(self, fields: dict[str, Any], pictures: int) -> Talk | None:
        """As of `read_talk`; None where the json has no field for one."""
        if any(name in fields for name in COLUMNS):
            return read_talk(fields, pictures)
        if pictures != 1:
            raise BadSample("no image" if not pictures else "several pictures", "beside captions there must be one")
        return None

    def texts(self, data: dict[str, bytes], fields: dict[str, Any]) -> list[str]:
        """All that is said, or the captions. BadSample."""
        if not any(name in fields for name in COLUMNS):
            return super().texts(data, fields)
        return [turn.text for turn in read_talk(fields).turns if turn.text]
