"""The top level is agreed, and each module folder explains itself."""

TOP_LEVEL = {
    "CMakeLists.txt", "README.md", "proto", "cachesvc", "worker", "kernels", "client", "deploy",
    "tests", "LICENSE", ".ci", ".clang-format", ".clang-tidy", ".gitignore", ".gitattributes",
    "CMakePresets.json",
}
REQUIRED = {"CMakeLists.txt", "README.md", "LICENSE"}
# The folders that hold a module; each has a README.md: purpose, data flow, threads.
MODULE_FOLDERS = [
    "proto", "proto/base", "proto/wire", "proto/transport", "cachesvc", "cachesvc/tier", "client",
    "kernels", "worker", "tests", "deploy",
]


def check(tree):
    wrong = []
    top = {name.split("/")[0] for name in tree.files}
    wrong += ["%s: not agreed at the top level" % name for name in sorted(top - TOP_LEVEL)]
    wrong += ["%s: missing" % name for name in sorted(REQUIRED - top)]
    for folder in MODULE_FOLDERS:
        here = [name for name in tree.files if name.startswith(folder + "/")]
        if here and folder + "/README.md" not in here:
            wrong.append("%s/README.md: missing" % folder)
    for name in tree.files:
        if name.endswith((".cc", ".cpp", ".cxx", ".hpp")):
            wrong.append("%s: C11 alone, CUDA in .cu files" % name)
    return wrong
