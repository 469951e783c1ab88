"""Holds the operator's decisions: limits, which URLs may be read, who may ask."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """How a server answers; sizes in bytes, times in seconds."""

    max_body: int = 32 << 20  # of one request
    # of all requests that are answered or wait, and of fetched pictures
    max_bodies: int = 256 << 20
    max_image: int = 20 << 20  # of one picture's file
    max_images: int = 16  # in one request
    body_seconds: float = 30.0  # a request's body must arrive in this time
    send_seconds: float = 60.0  # a client must take what is sent in this time
    fetch_seconds: float = 15.0  # a picture's address must answer in this time
    https_images: bool = False
    media_path: Path | None = None  # file: URLs below this folder are read
    api_keys: tuple[str, ...] = ()  # clients send one of them; each key counts as one client
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()  # names by which clients may call this server, besides localhost
    # what whoever is refused for a name or an origin is told to do
    allow_host: str = "its operator can add that to its hosts"
    allow_origin: str = "its operator can add to its cors_origins"  # and then the origin
    aliases: tuple[str, ...] = ()  # names of the model, besides its own
    slots: int = 1  # answers that run at once, if the engine and the memory allow it
    queue: int = 32  # requests that may wait
    keep_alive: float | None = None  # the model is unloaded after this time without a request
    grace: float = 2.5  # on shutdown, a running answer may go on for this time
