"""The mathematics: encoders, aggregators, the plug, and the composite with a frozen backbone."""

from .persona import EncoderSpec, Persona
from .personalizer import Personalizer
from .plug import PersonaPlug
from .pplug import PPlugForConditionalGeneration, PPlugModel

__all__ = ["EncoderSpec", "PPlugForConditionalGeneration", "PPlugModel", "Persona", "PersonaPlug", "Personalizer"]
