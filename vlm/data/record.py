"""Which members make a sample, and what their bytes say: captions, fields, an id."""

from collections.abc import Collection
from typing import Any

from vlm.data.captions import caption_spec, find_captions, json_fields, parse_caption
from vlm.data.image import BadSample
from vlm.data.talk import Talk
from vlm.data.tar import Group

MAX_BYTES = 2**28  # of one member; a larger one is damage or no picture


class Record:
    """How a sample is stored: `image` suffixes and `caption` places, first found wins; see `vlm.data.shards.Shards`."""

    def __init__(self, image: str, caption: str, id_field: str | None = None) -> None:
        """ValueError: a caption that is neither txt nor json:FIELD."""
        self.images = [suffix.strip().lower() for suffix in image.split(";")]
        self.captions = parse_caption(caption)
        self.id_field = id_field
        self.texts_in = list(dict.fromkeys([*(suffix for suffix, _ in self.captions), "json"]))
        suffixes = dict.fromkeys([*self.images, *self.texts_in])
        self.columns = {suffix: i for i, suffix in enumerate(suffixes)}

    def fault(self, group: Group) -> str:
        """Why a group is no sample, by its names alone; empty when it may be one."""
        if group.fault:
            return group.fault
        for name, wanted in (("no image", self.images), ("no caption", [suffix for suffix, _ in self.captions])):
            if not any(suffix in group.members for suffix in wanted):
                return "dotted name" if self.dotted(group) else name
        return name_fault(group.key)

    def dotted(self, group: Group) -> list[str]:
        """Suffixes such as v2.jpg, of photo.v2.jpg: webdataset takes "photo" for the key, and v2.jpg is no picture."""
        return [suffix for suffix in group.members if "." in suffix and suffix.rpartition(".")[2] in self.columns]

    @property
    def what(self) -> str:
        """What a sample must have, for messages."""
        return "both picture and caption"

    @property
    def kinds(self) -> list[str]:
        """What decides which members are pictures."""
        return self.images

    def members(self, group: Group) -> dict[str, tuple[int, int]]:
        """The members of a sample by the names that the others here go by: their suffixes."""
        return group.members

    def knows(self, suffix: str) -> bool:
        """Whether members of this suffix are of any use."""
        return suffix in self.columns

    def pictures(self, names: Collection[str]) -> list[str]:
        """Which of the members of a sample are its pictures, in order: one, the first that is wanted."""
        return [next(suffix for suffix in self.images if suffix in names)]

    def talk(self, fields: dict[str, Any], pictures: int) -> Talk | None:
        """The conversation of a sample; None: it has captions. BadSample for one that cannot be used."""
        return None

    def fields(self, data: dict[str, bytes]) -> dict[str, Any]:
        """Of the sample's json; empty without one. BadSample when it cannot be read."""
        return json_fields(data["json"]) if "json" in data else {}

    def texts(self, data: dict[str, bytes], fields: dict[str, Any]) -> list[str]:
        """Cleaned captions. BadSample when there are none, or none that can be used."""
        return find_captions(self.captions, data, fields)

    def id(self, key: str, fields: dict[str, Any]) -> str:
        """What says which samples show the same thing. BadSample without the field."""
        if self.id_field is None:
            return key
        if fields.get(self.id_field) is None:
            raise BadSample("no id", f"its json has no field {self.id_field!r}")
        return str(fields[self.id_field])

    @property
    def caption_spec(self) -> str:
        """As it was written, for messages."""
        return caption_spec(self.captions)


def name_fault(key: str) -> str:
    """Why a sample cannot have this name; empty when it can."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return "name is not UTF-8"
    return ""
