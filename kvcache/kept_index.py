"""Which cached blocks a shard's file keeps across restarts: the index beside the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

_MISFITS = (IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What tensors of unexpected shapes and dtypes lead to."""


@dataclass(frozen=True, slots=True)
class KeptIndex:
    """``hashes``: the content of each place of the file, oldest use first; ``sums`` [layers,
    places of the file] the checksum of each of its pieces.

    No more than the sums is needed to trust an index: whatever else is wrong with it, with the file
    or with how the two fit each other, the pieces of that place fail their checksums, and the
    content counts as lost.
    """

    hashes: Mapping[int, bytes]
    sums: torch.Tensor

    def write(self, path: Path, layout: str) -> None:
        """Replace the index at ``path`` by this one at once; an empty one by none. Raises OSError.

        ``layout`` says how the file lies: an index of another layout is not read.
        """
        if not self.hashes:
            path.unlink(missing_ok=True)
            return
        partial = path.with_suffix(".partial")
        places = torch.tensor(list(self.hashes), dtype=torch.int64)
        digests = torch.frombuffer(bytearray(b"".join(self.hashes.values())), dtype=torch.uint8)
        tensors = {
            "places": places,
            "hashes": digests.view(len(self.hashes), -1),
            "sums": self.sums[:, places].contiguous(),
        }
        try:
            descriptor = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
            os.close(descriptor)
            save_file(tensors, partial, metadata={"layout": layout})
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path, layout: str, num_layers: int, num_places: int) -> KeptIndex:
        """The index at ``path``; an empty one where there is none that fits ``layout``."""
        sums = torch.zeros(num_layers, num_places, dtype=torch.int64)
        with (
            contextlib.suppress(OSError, safetensors.SafetensorError, *_MISFITS),
            safetensors.safe_open(path, framework="pt") as file,
        ):
            if (file.metadata() or {}).get("layout") == layout:
                places = file.get_tensor("places")
                digests = file.get_tensor("hashes")
                sums[:, places] = file.get_tensor("sums")
                return cls(
                    {
                        place: bytes(digest)
                        for place, digest in zip(places.tolist(), digests.tolist(), strict=True)
                        if 0 <= place < num_places
                    },
                    sums,
                )
        return cls({}, sums)
