"""`unclip inspect FILE.png`: what a picture's recipe says, for people.

    unclip inspect out/0002-seed2.png
    unclip inspect out/grid-0000.png --json

The recipe of a picture of `unclip generate`, the settings of each stage in a table and below it the
pictures that it was drawn from, with their own recipes; of another program's PNG what its
`parameters` text says.
"""

import json

from absl import flags

from unclip import errors
from unclip.files import images

_JSON = flags.DEFINE_bool("json", False, "print the recipe as JSON, one a line")


def main(argv):
    """Prints the recipe of each PNG named."""
    if len(argv) < 2:
        raise errors.ConfigError("expected a PNG, as in `unclip inspect out/0002-seed2.png`")
    found = []
    for path in argv[1:]:
        recipe = images.read_recipe(path)
        if recipe is None:
            raise errors.ConfigError(f"{path} holds no recipe and no parameters text")
        found.append((path, recipe))
    for path, recipe in found:
        if _JSON.value:
            print(json.dumps(recipe, sort_keys=True))
        else:
            print("\n".join([*([path] if len(found) > 1 else []), *images.described(recipe)]))
