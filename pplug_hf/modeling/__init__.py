"""The mathematics: encoders, aggregators, the plug, and the composite with a frozen backbone."""

from .encoding import PersonaEncoder
from .persona import Persona
from .plug import PersonaPlug
from .pplug import PPlugForConditionalGeneration, PPlugModel

__all__ = ["PPlugForConditionalGeneration", "PPlugModel", "Persona", "PersonaEncoder", "PersonaPlug"]
