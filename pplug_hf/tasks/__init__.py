"""Tasks: what is asked of a user, how an answer is judged, and the settings that suit it."""

from . import demo, fit_recipes, lamp, lamp_qa, longlamp, presets
from .recipes import FIT_RECIPES, register_recipe
from .task import register_task

for _of in lamp.MODULES:
    register_task(_of.TASK, (_of.PAPER,))
for _of in lamp.MODULES:  # lists show all of the paper's first
    register_recipe(_of.OURS)
for _of in lamp.MODULES:
    register_recipe(_of.RELEASE)
for _preset in (presets.SMALL, presets.LARGE):
    register_recipe(_preset)
FIT_RECIPES.update({recipe.name: recipe for recipe in fit_recipes.RECIPES})
register_task(demo.TASK)
for _task in (*longlamp.TASKS, lamp_qa.TASK):
    register_task(_task)
