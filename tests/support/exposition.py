"""A strict reader of Prometheus' text format 0.0.4: refuses what a scrape might merely tolerate.

Families must have HELP, then TYPE, then their samples, once and together; counters end in _total
and do not fall below 0; buckets rise, end in +Inf and agree with the count. Where the package
prometheus_client is installed, its own parser must read the same samples.
"""

import math
import re

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
SAMPLE = re.compile(r"(%s)(?:\{(.*)\})? (\S+)" % NAME)
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\n"])*)"')
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count")}


class Wrong(AssertionError):
    """The text breaks a rule of the format."""


def parse_labels(text):
    labels, at = {}, 0
    while at < len(text):
        match = LABEL.match(text, at)
        if not match or match[1] in labels:
            raise Wrong("labels: %r" % text)
        labels[match[1]] = match[2]
        at = match.end()
        if at < len(text):
            if text[at] != "," or at + 1 == len(text):
                raise Wrong("labels: %r" % text)
            at += 1
    return labels


class Family:
    def __init__(self, name, text):
        self.name, self.help, self.type = name, text, None
        self.samples = {}  # (name, ((label, value), ...)) -> number

    def add(self, name, labels, value):
        allowed = [self.name + suffix for suffix in SUFFIXES.get(self.type, ("",))]
        key = (name, tuple(sorted(labels.items())))
        if name not in allowed or key in self.samples:
            raise Wrong("sample %s of family %s" % (key, self.name))
        if self.type != "gauge" and not value >= 0:
            raise Wrong("%s is %s" % (key, value))
        self.samples[key] = value

    def check(self):
        if not self.help or self.type not in ("counter", "gauge", "histogram"):
            raise Wrong("family %s: help %r, type %r" % (self.name, self.help, self.type))
        if (self.type == "counter") != self.name.endswith("_total"):
            raise Wrong("%s is a %s" % (self.name, self.type))
        if self.type == "histogram":
            self.check_buckets()

    def check_buckets(self):
        series = {}
        for (name, labels), value in self.samples.items():
            rest = tuple(pair for pair in labels if pair[0] != "le")
            one = series.setdefault(rest, {"buckets": []})
            if name.endswith("_bucket"):
                one["buckets"].append((float(dict(labels)["le"]), value))
            else:
                one[name[len(self.name) :]] = value
        for rest, one in series.items():
            bounds = [bound for bound, _ in one["buckets"]]
            counts = [count for _, count in one["buckets"]]
            fine = bounds == sorted(set(bounds)) and bounds[-1:] == [math.inf]
            if not fine or counts != sorted(counts) or counts[-1] != one["_count"]:
                raise Wrong("buckets of %s%s: %s" % (self.name, rest, one))
            if "_sum" not in one or (one["_sum"] > 0) > (one["_count"] > 0):
                raise Wrong("sum of %s%s: %s" % (self.name, rest, one))


def parse(text):
    """{family name: Family}"""
    families, current = {}, None
    if not text.endswith("\n"):
        raise Wrong("the last line has no end")
    for line in text[:-1].split("\n"):
        words = line.split(" ", 3)
        if line.startswith("# HELP "):
            if len(words) != 4 or not re.fullmatch(NAME, words[2]) or words[2] in families:
                raise Wrong(line)
            current = families[words[2]] = Family(words[2], words[3])
        elif line.startswith("# TYPE "):
            if len(words) != 4 or not current or current.name != words[2] or current.type:
                raise Wrong(line)
            current.type = words[3]
        else:
            match = SAMPLE.fullmatch(line)
            if not match or not current or not current.type:
                raise Wrong(line)
            current.add(match[1], parse_labels(match[2] or ""), float(match[3]))
    for family in families.values():
        family.check()
    compare(text, families)
    return families


def compare(text, families):
    """The samples that prometheus_client reads, where it is installed, must be ours."""
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        return
    theirs = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            theirs[(sample.name, tuple(sorted(sample.labels.items())))] = sample.value
    ours = {key: value for family in families.values() for key, value in family.samples.items()}
    if theirs != ours:
        raise Wrong("prometheus_client reads: %s" % sorted(set(theirs.items()) ^ set(ours.items())))
