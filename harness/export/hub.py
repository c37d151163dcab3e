"""The Hub: a folder pushed as a model, and read back."""

from __future__ import annotations

import hashlib
import re

from harness.errors import UserError, first_line

FILES = ("model.safetensors", "config.json", "README.md")


def push(folder, name, private=True) -> str:
    """Upload the folder's files as the model `name` and read them back; returns a line about it.

    Without a name nothing is sent: the line is the command that would send it. Raises UserError for
    an invalid name, and where the Hub does not answer or then has other bytes than were sent.
    """
    if not name:
        return "to push it   the same command with --push OWNER/NAME (private; after hf auth login)"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"--push {name}: a model on the Hub is called owner/name")
    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True, repo_type="model")
        commit = api.upload_folder(
            repo_id=name, folder_path=str(folder), allow_patterns=list(FILES),
            commit_message="Upload of export.py", repo_type="model",
        )  # fmt: skip
        for file in FILES:
            download = hf_hub_download(name, file, revision=commit.oid)
            with open(download, "rb") as stream:
                digest = hashlib.sha256(stream.read()).digest()
            if digest != hashlib.sha256((folder / file).read_bytes()).digest():
                raise UserError(f"{name} on the Hub has another {file} than was sent")
    except UserError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise UserError(
            f"the Hub did not take {name}: {reason}; the folder is complete: "
            f"hf upload {name} {folder} ."
        ) from None
    kind = "private" if private else "public"
    return f"pushed       https://huggingface.co/{name} ({kind}); read back, it is the same"
