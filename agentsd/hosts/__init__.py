"""What is known of each architecture: one file a host."""

from agentsd.hosts.base import Host, Inputs, Middle, Site
from agentsd.hosts.flux import Flux
from agentsd.hosts.pixart import PixArt
from agentsd.hosts.reused import Chroma, Flux2, QwenImage, Sana
from agentsd.hosts.sd3 import StableDiffusion3
from agentsd.hosts.unet import UNet

__all__ = ["HOSTS", "Flux", "Host", "Inputs", "Middle", "PixArt", "Site", "StableDiffusion3", "UNet", "host_of"]

HOSTS: tuple[Host, ...] = (StableDiffusion3(), Flux(), PixArt(), QwenImage(), Flux2(), Chroma(), Sana())


def host_of(net: object) -> Host:
    """The host that knows ``net``; a UNet's, which finds nothing to patch, where none does."""
    return next((host for host in HOSTS if host.knows(net)), UNet())
