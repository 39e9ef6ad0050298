"""The files of the checkout, and C source with comments and strings blanked out."""

import os
import re
import subprocess

SKIPPED_FOLDERS = {".git", ".venv", "__pycache__", ".kvasir", "build"}
C_SUFFIXES = (".c", ".h", ".cu", ".cuh", ".def")


class Tree:
    """Every file under root that belongs to the project, as paths relative to root."""

    def __init__(self, root):
        self.root = os.path.abspath(root)
        self.files = sorted(self._listed())
        self._text = {}

    def _listed(self):
        command = ["git", "-C", self.root, "ls-files", "-co", "--exclude-standard", "-z"]
        inside = os.path.isdir(os.path.join(self.root, ".git")) or os.path.isfile(
            os.path.join(self.root, ".git")
        )
        if inside:
            done = subprocess.run(command, capture_output=True, check=False)
            if done.returncode == 0:
                names = done.stdout.decode().split("\0")
                return [n for n in names if n and os.path.isfile(os.path.join(self.root, n))]
        return self._walked()

    def _walked(self):
        """For a tarball, which has no git."""
        found = []
        for folder, folders, names in os.walk(self.root):
            folders[:] = [
                f for f in folders if f not in SKIPPED_FOLDERS and not f.startswith("build-")
            ]
            found += [os.path.relpath(os.path.join(folder, n), self.root) for n in names]
        return found

    def path(self, name):
        return os.path.join(self.root, name)

    def text(self, name):
        if name not in self._text:
            with open(self.path(name), encoding="utf-8", errors="replace") as file:
                self._text[name] = file.read()
        return self._text[name]

    def lines(self, name):
        return self.text(name).split("\n")

    def is_script(self, name):
        """A file without suffix that starts with #!."""
        return "." not in os.path.basename(name) and self.text(name).startswith("#!")

    def c_files(self):
        return [n for n in self.files if n.endswith(C_SUFFIXES)]

    def source_files(self):
        """What people edit: code, scripts, build files, protocol."""
        suffixes = C_SUFFIXES + (".py", ".sh", ".proto", ".cmake", ".cpp", ".cc")
        return [
            n
            for n in self.files
            if n.endswith(suffixes)
            or os.path.basename(n) == "CMakeLists.txt"
            or (os.path.splitext(n)[1] == "" and self.is_script(n))
        ]


TOKEN = re.compile(
    r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.DOTALL
)


def blank(match):
    """Keeps line breaks and the quotes, drops the rest."""
    text = match.group(0)
    kept = "".join(c if c == "\n" else " " for c in text)
    return kept if text[0] == "/" else text[0] + kept[1:-1] + text[-1]


def code_only(text):
    """C source of the same shape, without what stands in comments and strings."""
    return TOKEN.sub(blank, text)
