# Writes a C file with the FileDescriptorProto of each SETS file (a FileDescriptorSet of one file):
# cmake -DOUT=... -DSETS="a.pb;b.pb" -P embed.cmake
set(text "/* Written by embed.cmake. */\n#include \"grpc/descriptors.h\"\n\n")
set(rows "")
foreach(set ${SETS})
    get_filename_component(name ${set} NAME_WE)
    file(READ ${set} hex HEX)
    string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes "${hex}")
    string(REGEX REPLACE "(.................................................................)"
        "\\1\n" bytes "${bytes}")
    string(APPEND text "static const uint8_t ${name}_set[] = {\n${bytes}\n};\n\n")
    string(APPEND rows "    {\"${name}.proto\", ${name}_set, sizeof(${name}_set)},\n")
endforeach()
string(APPEND text "const kvti_descriptor_set kvti_descriptor_sets[] = {\n${rows}    {0},\n};\n")
file(WRITE ${OUT} "${text}")
