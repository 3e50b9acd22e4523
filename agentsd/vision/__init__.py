"""Agent attention for vision transformers: the module, and the paper's models for timm.

The module needs torch alone. With timm installed, importing this package registers ``agent_deit_*``, ``agent_pvt_*``,
``agent_swin_*`` and ``agent_cswin_*``: ``timm.create_model("agent_pvt_tiny", num_classes=10)``.
"""

from importlib.util import find_spec
from typing import Any

from agentsd.attention import agent_attention
from agentsd.vision.attention import AgentAttention

__all__ = ["AgentAttention", "agent_attention"]

if find_spec("timm"):
    from timm import create_model

    from agentsd.vision.agent_cswin import AgentCSwin
    from agentsd.vision.agent_deit import AgentDeiT
    from agentsd.vision.agent_pvt import AgentPVT
    from agentsd.vision.agent_swin import AgentSwin

    __all__ += ["AgentCSwin", "AgentDeiT", "AgentPVT", "AgentSwin", "create_model"]
else:

    def __getattr__(name: str) -> Any:
        if name in ("AgentCSwin", "AgentDeiT", "AgentPVT", "AgentSwin", "create_model"):
            raise ImportError(f'agentsd.vision.{name} needs timm: pip install "agentsd[vision]"')
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
