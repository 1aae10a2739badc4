"""``hf://``: detectors in the layout of the Hugging Face Hub, in a folder of this machine or on the Hub itself.

``hf://FOLDER`` and ``hf://OWNER/NAME``, with ``@REVISION`` behind it for another than ``main``, stand wherever weights or a
config file are named; the folder wins where both are there. ``tools/report.py --publish`` writes such folders. What is read
are a config in YAML, weights in safetensors and the classes' names: nothing of it is code.
"""

from __future__ import annotations

import os
import re
from urllib.parse import quote

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from era.addresses import HUB, check_address
from era.checkpoint.fetching import fetch
from era.errors import UserError

CONFIG, WEIGHTS, CLASSES = "config.yaml", "model.safetensors", "classes.txt"
ENDPOINT = "HF_ENDPOINT"  # environment variable: a mirror, as the Hub's own tools read it
HUB_ADDRESS = "https://huggingface.co"
_REPOSITORY = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w.-]*))?")


def hub_file(address: str, name: str, *, what: str) -> str:
    """Path of one file of a published detector, downloaded if it is not there yet.

    Args:
        address: ``hf://FOLDER`` or ``hf://OWNER/NAME``.
        name: of the file, :data:`CONFIG`, :data:`WEIGHTS` or :data:`CLASSES`.
        what: how a message names the source of the address.

    Raises:
        UserError: neither a folder nor a repository's name, a folder without the file, or no download.
    """
    place = address.removeprefix(HUB).rstrip("/")
    if os.path.isdir(place):
        path = os.path.join(place, name)
        if not os.path.isfile(path):
            raise UserError(
                f"{what} {address!r} holds no {name}: expected a folder that tools/report.py --publish wrote; name one."
            )
        return path
    check_address(address, what=what)
    found = _REPOSITORY.fullmatch(place)
    if found is None:
        raise UserError(
            f"{what} {address!r} is neither a folder nor OWNER/NAME of a repository on the Hub: correct it."
        )
    base = os.environ.get(ENDPOINT, HUB_ADDRESS).rstrip("/")
    url = f"{base}/{found[1]}/resolve/{quote(found[2] or 'main')}/{name}"
    return fetch(url, what=f"{what} {address!r}:")


class _HubHandler(PathHandler):
    """Gives Detectron2's own readers the config of ``hf://...``, or another file that the address ends with."""

    def _get_supported_prefixes(self) -> list[str]:
        return [HUB]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        folder, _, name = path.rpartition("/")
        if name in (CONFIG, WEIGHTS, CLASSES):
            return hub_file(folder, name, what="the file")
        return hub_file(path, CONFIG, what="the config")

    def _isfile(self, path: str, **kwargs) -> bool:
        try:
            return os.path.isfile(self._get_local_path(path))
        except UserError:
            return False

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        return open(self._get_local_path(path), mode, buffering)


PathManager.register_handler(_HubHandler(), allow_override=True)
