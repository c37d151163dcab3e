"""The Hugging Face Hub: whether it can be reached, and files of its models through its cache."""

from __future__ import annotations

import socket
import threading
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from harness.errors import UserError

TIMEOUT_S = 3.0
PREFIX = "hf-hub:"  # of the name of a model on the Hub, as timm has it


def answered_within(seconds, ask) -> bool:
    """Whether `ask()` is true before so many seconds are over.

    In a thread, because looking up a host's address knows no timeout, and hangs on some clusters.
    """
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask()), name="probe", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers == [True]


def hub_answers(endpoint):
    """Whether something listens at the Hub, or at the proxy before it; at most 3 s."""
    hub = urlsplit(endpoint)
    proxy = urllib.request.getproxies().get(hub.scheme)
    direct = not proxy or urllib.request.proxy_bypass(hub.hostname)
    address = hub if direct else urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = address.port or (443 if address.scheme == "https" else 80)

    def connects():
        try:
            socket.create_connection((address.hostname, port), timeout=TIMEOUT_S).close()
        except OSError:
            return False
        return True

    return answered_within(TIMEOUT_S, connects)


@contextmanager
def reachable_or_cached():
    """While the block runs, the Hub's libraries use only their cache if the Hub does not answer.

    Otherwise they would retry for half a minute.
    """
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = was_offline or not hub_answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def model_file(spec, *names) -> Path:
    """The first of the files called `names` that the model `spec` has, in the Hub's cache.

    spec: "hf-hub:owner/name", with "@revision" where it is not the newest one. Raises UserError
    with the command that fetches it where neither the Hub nor the cache has it.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, _, revision = spec.removeprefix(PREFIX).partition("@")
    cache_error = None
    with reachable_or_cached():
        for name in names:
            try:
                return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision or None))
            except LocalEntryNotFoundError as error:  # another file may be there
                cache_error = error
            except EntryNotFoundError:
                continue
            except Exception as error:  # no such model, no right to read it, no space
                reason = str(error).strip().partition("\n")[0][:120]
                raise UserError(f"{spec} could not be read ({reason})") from None
    if cache_error is None:
        raise UserError(f"{spec} has no {' or '.join(names)}")
    revision_flag = f" --revision {revision}" if revision else ""
    cache = huggingface_hub.constants.HF_HUB_CACHE
    raise UserError(
        f"{spec}: {names[0]} is not in the cache and the Hub is out of reach; where there is a "
        f"network, hf download {repo}{revision_flag} puts it there ({cache})"
    )
