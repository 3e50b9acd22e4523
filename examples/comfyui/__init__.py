"""AgentSD for ComfyUI: put this folder among ComfyUI's custom nodes as it is."""

from .agentsd_node import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
