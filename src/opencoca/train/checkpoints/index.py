"""What a checkpoint consists of: its files with their checksums, and where the rows of every tensor are.

A tensor is whole in one file, or its rows are spread over the files of several processes by the rule of
`torch.chunk`: all but the last have equally many, and some at the end may have none.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from opencoca.system.files import flush_to_disk
from opencoca.train.checkpoints.shard_file import FileRecord

INDEX_NAME = "index.json"
_FORMAT = 1


class Layout(NamedTuple):
    """A tensor's whole shape, and the processes that hold its rows, in order."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]

    def rows(self, part: int) -> tuple[int, int]:
        """The first row and the one after the last that process ``ranks[part]`` holds."""
        count = self.shape[0] if self.shape else 1
        most = -(-count // len(self.ranks))
        return min(count, part * most), min(count, (part + 1) * most)


@dataclass(frozen=True)
class CheckpointIndex:
    """The content of a checkpoint. files: by rank; tensors: by key; progress: as in `TrainState`."""

    step: int
    progress: dict[str, Any]
    average_updates: int
    files: tuple[FileRecord, ...]
    tensors: dict[str, Layout]

    def write(self, folder: Path) -> None:
        """Writes the index to a new file; it has reached the disk when this returns. Raises OSError if it can't."""
        groups = list(dict.fromkeys(layout.ranks for layout in self.tensors.values()))
        numbers = {ranks: number for number, ranks in enumerate(groups)}
        content = {
            "format": _FORMAT,
            "step": self.step,
            "progress": self.progress,
            "average_updates": self.average_updates,
            "files": self.files,
            "groups": groups,
            "tensors": {key: [layout.shape, numbers[layout.ranks]] for key, layout in self.tensors.items()},
        }
        text = json.dumps(content)
        path = folder / INDEX_NAME
        with open(path, "x", encoding="utf-8") as file:
            file.write(json.dumps({"crc32": zlib.crc32(text.encode())})[:-1] + ', "content": ' + text + "}\n")
        flush_to_disk(path)

    @staticmethod
    def read(folder: Path) -> "CheckpointIndex":
        """Raises ValueError, naming the file, if it is not what was written."""
        path = folder / INDEX_NAME
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            content = stored["content"]
            crc = zlib.crc32(json.dumps(content).encode())
            if crc != stored["crc32"]:
                raise ValueError(f"the checksum of its content is {crc:08x} and not {stored['crc32']:08x}")
            if content["format"] != _FORMAT:
                raise ValueError(f"its format is number {content['format']}, which this version does not know")
            files = tuple(FileRecord(*record) for record in content["files"])
            if any(Path(record.name).name != record.name for record in files):
                raise ValueError("it names files in other folders")
            groups = [tuple(ranks) for ranks in content["groups"]]
            tensors = {key: Layout(tuple(shape), groups[number]) for key, (shape, number) in content["tensors"].items()}
            return CheckpointIndex(
                content["step"], dict(content["progress"]), content["average_updates"], files, tensors
            )
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is damaged ({error})") from error
