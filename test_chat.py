#!/usr/bin/env python3
"""Tests of chat.py and loadtest.py, in their order: pure parts, real sockets, whole programs.

Run: python3 test_chat.py

The tests of several classes are spread over processes; those of one class run in this one, for a debugger.

    CHAT_TEST_LONG=1 python3 test_chat.py -k Fuzz        a million lines each at the parsers and at a server
    CHAT_TEST_SEED=n python3 test_chat.py FuzzServer     what a failure named
    CHAT_TEST_LONG=1 python3 test_chat.py Durable        100 kills of a server, where the suite has 10
    CHAT_TEST_LONG=1 python3 test_chat.py ForeignServers    60 lines where the suite has 12
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import binascii
import cmd
import codecs
import collections
import concurrent.futures
import contextlib
import copy
import ctypes
import dataclasses
import errno
import functools
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import pickle
import platform
import py_compile
import queue
import random
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unicodedata
import unittest
import urllib.error
import urllib.request
import xml.etree.ElementTree as ElementTree
from array import array
from fractions import Fraction
from itertools import combinations
from typing import Any, Callable, Iterable, Iterator, List, NamedTuple, Sequence, Tuple
from unittest import mock

try:
    import ssl
except ImportError:  # Python can be built without it
    ssl = None  # type: ignore[assignment]

import chat
import loadtest
from chat import Message
from loadtest import CHECKS, Finding, History, Sent

HERE = pathlib.Path(__file__).resolve().parent
PATIENCE = 60.0  # seconds before a test gives up; never a measure of speed
NEEDS_SIGNALS = unittest.skipUnless(os.name == "posix", "needs signals that a program can catch")
MOVES_OPEN_FILES = unittest.skipUnless(os.name == "posix", "needs to move, remove or link a file that is open")
ERROR = "ERROR :"  # how the last line of a server begins on IRC
NARROW = 1 << 16  # bytes in a socket
SLACK = 8  # bytes by which what is pickled differs for the same amount of data
README = (HERE / "README.md").read_text(encoding="utf-8")
SOURCES = {module: (HERE / f"{module.__name__}.py").read_text(encoding="utf-8") for module in (chat, loadtest)}


class Shape(unittest.TestCase):
    """The file itself: its map, its layers, the size of its pieces."""

    def sections(self, source: str) -> dict[str, tuple[int, int]]:
        lines = source.splitlines()
        bar = "# " + "-" * 77
        starts = [i for i in range(1, len(lines) - 1) if lines[i - 1] == lines[i + 1] == bar]
        ends = [*starts[1:], len(lines) + 2]
        return {lines[start][2:]: (start + 1, end - 1) for start, end in zip(starts, ends)}

    def test_docstring_maps_the_sections(self) -> None:
        for module, source in SOURCES.items():
            listed = re.findall(r"^    (\w[\w ]*?)  +\S", module.__doc__ or "", re.MULTILINE)
            listed = [name for name in listed if not name.startswith("python")]
            self.assertEqual(listed, list(self.sections(source)))

    def test_functions_and_classes_are_short(self) -> None:
        for path in HERE.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    bound = 200 if isinstance(node, ast.ClassDef) else 40
                    self.assertLessEqual((node.end_lineno or 0) - node.lineno + 1, bound, f"{path.name}: {node.name}")

    def test_sections_use_only_what_they_may_know(self) -> None:
        effects = {"socket", "select", "selectors", "subprocess", "signal", "open", "os"}
        names = list(self.sections(SOURCES[chat]))
        pure = [*names[: names.index("chat state")], "delivery", "commands"]
        forbidden = {name: effects | {"threading"} for name in pure}
        forbidden["chat state"] = effects
        names = list(self.sections(SOURCES[loadtest]))
        forbidden.update((name, effects | {"threading"}) for name in names[1 : names.index("server under test")])
        for source in SOURCES.values():
            used = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
            for name, (first, last) in self.sections(source).items():
                for node in used:
                    if first <= node.lineno <= last:
                        self.assertNotIn(node.id, forbidden.get(name, set()), f"{name}, line {node.lineno}")

    def test_only_the_standard_library(self) -> None:
        for source in SOURCES.values():
            for node in ast.walk(ast.parse(source)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                for name in names:
                    if hasattr(sys, "stdlib_module_names"):
                        self.assertIn(name.partition(".")[0], sys.stdlib_module_names)

    def test_limits_agree_with_each_other(self) -> None:
        prefix = 1 + chat.NICK_BYTES + 1 + chat.USER_CHARS + 1 + 10 + 1
        self.assertLessEqual(prefix + len("TOPIC ") + chat.CHANNEL_BYTES + 2 + chat.TOPIC_BYTES + 2, chat.LINE_BYTES)
        numeric = 1 + 63 + len(" 353 ") + chat.NICK_BYTES + len(" = ") + chat.CHANNEL_BYTES + 2
        self.assertLessEqual(numeric + chat.NAMES_BYTES + 2, chat.LINE_BYTES)
        modes = len("+b-b+b-b+Cimnst-Cimnst") + chat.MAX_MODES * (1 + max(chat.MASK_BYTES, chat.NICK_BYTES))
        self.assertLessEqual(prefix + len(" MODE ") + chat.CHANNEL_BYTES + 3 + modes + 2, chat.LINE_BYTES)
        self.assertLess(chat.LOG_HIGH_WATER * chat.LINE_BYTES, chat.Limits().outbox)


class Readme(unittest.TestCase):
    """The README is short, and all that it tells to type exists. ReadmeOutput runs what it shows."""

    def test_it_is_short(self) -> None:
        self.assertLessEqual(len(README.splitlines()), 300)

    def commands(self, program: str) -> list[list[str]]:
        """The arguments of each command that runs a program, up to a pipe or a redirection."""
        found = []
        for match in re.finditer(rf"python3? {program}\.py(?: +([^`\n]*))?", README):
            words = shlex.shlex(match[1] or "", posix=True, punctuation_chars=True)
            words.whitespace_split, words.commenters = True, "#"
            found.append(list(itertools.takewhile(lambda word: word not in ("|", ">"), words)))
        return found

    def test_commands_are_understood(self) -> None:
        for module, least in ((chat, 10), (loadtest, 7)):
            commands = self.commands(module.__name__)
            self.assertGreaterEqual(len(commands), least)
            for args in commands:
                with self.subTest(args):
                    if "--help" in args:
                        self.help_of(module, *args)
                    else:
                        module.parser().parse_args(args)

    def help_of(self, module: Any, *args: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out, self.assertRaises(SystemExit) as end:
            module.parser().parse_args(args)
        self.assertEqual(end.exception.code, 0)
        return out.getvalue()

    def test_flags_and_tests_exist(self) -> None:
        known = self.help_of(loadtest, "--help")
        for mode in ("server", "client", "history"):
            known += self.help_of(chat, mode, "--help")
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README))
        self.assertGreater(len(flags), 15)
        self.assertLessEqual(flags, set(re.findall(r"--[a-z][\w-]*", known)))
        for name in ("BotLibraries", "ForeignServers", "RealClients"):
            self.assertIn(f"`{name}`", README)
            self.assertTrue(issubclass(globals()[name], unittest.TestCase))

    def test_slash_commands_exist(self) -> None:
        known = {*chat.SLASH_COMMANDS, *chat.OperatorCommands(mock.Mock()).help}
        named = set(re.findall(r"`/([a-z]+)", README))
        self.assertGreater(len(named), 10)
        self.assertLessEqual(named, known)


class Names(unittest.TestCase):
    GOOD = ["bob", "Борис", "美咲", "José", "山田たろう", "홍길동", "_x", "`a", "[x]", "a-b", "x1", "दिल्ली", "ñ" * 24]
    BAD = ["", "1bob", "-x", "a b", "a\x1b[31m", "bоb", "a\u202eb", "a\u200db", "bob\u034f", "\u3164", "a,b",
           "b\udcff", "x" * 25, "美" * 22, "a!b", "a@b", "*", "bob\ufe0f", "a\x00",
           "\ufdfa", "\ufdfb", "ŉa", "İ" * 24]  # fmt: skip

    def test_good(self) -> None:
        for name in self.GOOD:
            with self.subTest(name):
                self.assertEqual(chat.check_nick(name), name)
        self.assertEqual(chat.check_nick("Jose\u0301"), "José")

    def test_bad(self) -> None:
        for name in self.BAD:
            with self.subTest(name), self.assertRaises(chat.CommandError) as caught:
                chat.check_nick(name)
            self.assertEqual(caught.exception.numeric, chat.ERR_ERRONEUSNICKNAME)

    def test_one_name_in_many_spellings(self) -> None:
        for one, other in (
            ("Bob", "bOB"), ("БОРИС", "борис"), ("ｂｏｂ", "bob"), ("𝐛𝐨𝐛", "bob"), ("STRASSE", "straße"),
        ):  # fmt: skip
            with self.subTest(one):
                self.assertEqual(chat.fold(one), chat.fold(other))
        self.assertNotEqual(chat.fold("bob"), chat.fold("rob"))

    def test_channels(self) -> None:
        for name in ("#chat", "#Über-uns", "#"):
            self.assertEqual(chat.check_channel(name), name)
        for name in ("chat", "", "#a b", "#a,b", "#\x07", "#\u200b", "#" + "x" * 50, "#" + "美" * 22):
            with self.subTest(name), self.assertRaises(chat.CommandError):
                chat.check_channel(name)

    def test_masks(self) -> None:
        for mask, full in (("bob", "bob!*@*"), ("*@host", "*!*@host"), ("bob!b", "bob!b@*"), ("bob!b@h", "bob!b@h")):
            self.assertEqual(chat.full_mask(mask), full)
        for mask, text, fits in (
            ("bob!*@*", "bob!b@h", True), ("bob!*@*", "bobby!b@h", False), ("b?b*", "bob", True), ("b?b", "bb", False),
            ("*", "", True), ("", "x", False), ("*ab*ab", "abaab", True), ("*ab*abc", "abaab", False),
            ("a**b", "ab", True), ("a?*", "a", False), ("a*?", "a", False), ("a*?*?c", "abbc", True),
            ("a.c", "abc", False), ("a*b*bc", "abxbc", True), ("a*?b*c", "ab\nbc", True),
            ("*" * 40 + "x", "y" * 80, False),
        ):  # fmt: skip
            with self.subTest(mask=mask, text=text):
                self.assertEqual(bool(chat.mask_pattern(mask).fullmatch(text)), fits)

    def test_a_mask_costs_little_whatever_is_in_it(self) -> None:
        names = ["y" * 4000, "ya" * 2000, "x" * 4000]
        masks = ["*" + "?" * 60 + "07!*@*", "*y" * 10 + "x", "*y?" * 9 + "x", "*" + "y?" * 30 + "x", "*?" * 39 + "x"]
        patterns = [chat.mask_pattern(mask) for mask in masks]
        began = time.process_time()
        found = [pattern.fullmatch(name) for _ in range(20) for pattern in patterns for name in names]
        # 300 of them: 0.1 s, and one minute where each * is tried anew
        self.assertLess(time.process_time() - began, 3.0)
        self.assertEqual(set(map(bool, found)), {False, True})
        for mask in ("*a" * 11, "x" * 81):
            self.assertRaises(ValueError, chat.mask_pattern, mask)

    def test_what_is_too_long_for_a_name_is_not_normalised(self) -> None:
        marks = "a" + "\u0345\u0301\u0327" * 30_000  # sorting them is quadratic: seconds
        began = time.process_time()
        self.assertEqual(chat.fold(marks), marks)
        for check in (chat.check_nick, chat.check_channel):
            self.assertRaises(chat.CommandError, check, f"#{marks}")
            self.assertRaises(chat.CommandError, check, marks)
        self.assertFalse(chat.mentions(marks, "bob"))
        chat.simpler_nick(marks)
        self.assertLess(time.process_time() - began, 1.0)
        self.assertTrue(chat.mentions("é " * 200 + "BOB: hello", "bob"))
        self.assertEqual(chat.check_nick("e\u0302\u0301" * 21), "ế" * 21)  # decomposed, a name is longer than it is

    def test_next_nick(self) -> None:
        self.assertEqual(chat.next_nick("bob"), "bob2")
        self.assertEqual(chat.next_nick("bob9"), "bob10")
        self.assertEqual(chat.next_nick("a" + "9" * 23), "a" + "9" * 13 + "1000000000")
        self.assertEqual(len(chat.next_nick("9" * 5000)), chat.NICK_CHARS)
        self.assertEqual(chat.next_nick("x" * 24), "x" * 23 + "2")
        self.assertEqual(chat.next_nick("\U00020000" * 16), "\U00020000" * 15 + "2")
        self.assertEqual(chat.next_nick("bobbobbob", 9), "bobbobbo2")

    def test_simpler_nick(self) -> None:
        for nick, simpler in (
            ("José", "Jose"), ("é2é", "e2e"), ("Joséphine-Alexandra", "Josephine-Alexandra"),
            ("Josephine-Alexandra", "Josephine"), ("Josephine12", "Josephi12"), ("bob", "bob"), ("Борис", ""),
            ("美咲2", ""),
        ):  # fmt: skip
            self.assertEqual(chat.simpler_nick(nick), simpler)

    def test_names_are_one_where_the_server_says_so(self) -> None:
        for mapping, same in (
            ("ascii", "Bob bob"), ("rfc1459", "B[]\\~ b{}|^"), ("rfc1459-strict", "B[]\\^ b{}|^"),
            ("unheard-of", "BÉ bé"),
        ):  # fmt: skip
            one, other = map(chat.folding(mapping), same.split())
            self.assertEqual(one, other, mapping)
        for mapping, different in (("ascii", "b[ b{"), ("rfc1459-strict", "b~ b^"), ("rfc1459", "É é")):
            one, other = map(chat.folding(mapping), different.split())
            self.assertNotEqual(one, other, mapping)

    def test_channels_and_nicks_are_told_apart(self) -> None:
        for target in ("#chat", "&local", "+modeless", "!12345safe", "@#chat", "%#chat"):
            self.assertTrue(chat.is_channel(target), target)
        for target in ("bob", "[bob]", "é", ""):
            self.assertFalse(chat.is_channel(target), target)


class WireFormat(unittest.TestCase):
    LINES = [
        ("PING x", Message("PING", ("x",))),
        ("privmsg #chat :hello  there ", Message("PRIVMSG", ("#chat", "hello  there "))),
        (":a!b@c  PRIVMSG   #chat  :x", Message("PRIVMSG", ("#chat", "x"), "a!b@c")),
        ("@a=1;b;+c=x\\:\\s\\\\ PING :", Message("PING", ("",), "", {"a": "1", "b": "", "+c": "x; \\"})),
        ("JOIN :", Message("JOIN", ("",))), ("X :a :b", Message("X", ("a :b",))), ("", Message("")), (":", Message("")),
        ("@", Message("", (), "", {})), ("A " + " ".join("123456789abcdefgh"), Message("A", tuple("123456789abcdef"))),
    ]  # fmt: skip

    def test_parse(self) -> None:
        for line, message in self.LINES:
            with self.subTest(line):
                self.assertEqual(chat.parse(line), message)

    def test_what_is_formatted_parses_to_the_same(self) -> None:
        rng = random.Random(1)
        for _ in range(2000):
            words = tuple("".join(rng.choices("ab#*", k=rng.randint(1, 3))) for _ in range(rng.randint(0, 5)))
            last = "".join(rng.choices("a :é", k=rng.randint(0, 6)))
            tags = {"".join(rng.choices("abc", k=2)): "".join(rng.choices("a; \\\r\n:=", k=3)) for _ in range(2)}
            message = Message("CMD", (*words, last), "n!u@h", tags)
            line = chat.format_tags(tags.items()) + chat.format_line(message)
            self.assertEqual(chat.parse(line), message, line)
            self.assertNotRegex(line, "[\r\n]")

    def test_format_line(self) -> None:
        for message, line in (
            (Message("JOIN", ("#chat",), "n!u@h"), ":n!u@h JOIN #chat"),
            (Message("NICK", ("rob",), "n!u@h"), ":n!u@h NICK :rob"),
            (Message("QUIT", ("gone",), "n!u@h"), ":n!u@h QUIT :gone"),
            (Message("TOPIC", ("#chat", "tea")), "TOPIC #chat :tea"), (Message("AWAY", ("",)), "AWAY :"),
            (Message("QUIT"), "QUIT"),
        ):  # fmt: skip
            with self.subTest(line):
                self.assertEqual(chat.format_line(message), line)

    def test_line_buffer(self) -> None:
        cases: list[tuple[bytes, list[bytes | None], bytes]] = [
            (b"a\nb\r\nc", [b"a", b"b"], b"c"),
            (b"\n\r\n\n", [], b""),
            (b"a\rb\n", [b"a\rb"], b""),
            (b"0123456789\n", [b"0123456789"], b""),
            (b"0123456789a\nb\n", [None, b"b"], b""),
            (b"012345678\r\n0123456789\r\n", [b"012345678", None], b""),
            (b"x" * 100 + b"\nb\n" + b"y" * 50 + b"\nc", [None, b"b", None], b"c"),
            ("é\n".encode(), ["é".encode()], b""),
            (b"\n" * 10000, [], b""),
        ]
        for data, lines, rest in cases:
            for size in (1, 3, len(data)):
                with self.subTest(data=data[:20], size=size):
                    buffer = chat.LineBuffer(10)
                    got = []
                    for start in range(0, len(data), size):
                        got += buffer.feed(data[start : start + size])
                    self.assertEqual(got, lines)
                    self.assertEqual(buffer.end(), rest)

    def test_line_buffer_stays_small(self) -> None:
        buffer = chat.LineBuffer(512)
        empty = len(pickle.dumps(buffer))
        reported = []
        for _ in range(1024):
            reported += buffer.feed(b"x" * 500)
            self.assertLessEqual(len(pickle.dumps(buffer)), empty + 512 + SLACK)
        self.assertEqual(reported, [None])

    def test_split_text(self) -> None:
        for text, size, pieces in (
            ("hello world", 20, ["hello world"]), ("hello world", 8, ["hello", "world"]),
            ("hello world", 5, ["hello", "world"]), ("abcdefgh", 3, ["abc", "def", "gh"]), ("ééé", 5, ["éé", "é"]),
            ("", 5, []),
        ):  # fmt: skip
            with self.subTest(text, size=size):
                self.assertEqual(chat.split_text(text, size), pieces)

    def test_server_time(self) -> None:
        self.assertEqual(chat.server_time(1769860800.5), "2026-01-31T12:00:00.500Z")


class Telnet(unittest.TestCase):
    """What telnet programs put between the text, and what they are answered."""

    CASES = [
        (b"bob\r\nhi\n", [b"bob", b"hi"], b""), (b"bob\r\0hi\r\0\r\0", [b"bob", b"hi"], b""),
        (b"bo\rb\n", [b"bo\rb"], b""), (b"a\0b\n", [b"a\0b"], b""),
        (b"\xff\xfd\x01bob\n", [b"bob"], b"\xff\xfc\x01"),  # DO ECHO: WONT
        (b"\xff\xfb\x1fb\xff\xfd\x03ob\n", [b"bob"], b"\xff\xfe\x1f\xff\xfc\x03"),  # WILL NAWS: DONT
        (b"\xff\xfe\x01\xff\xfc\x01bob\n", [b"bob"], b""),  # DONT, WONT: as it is
        (b"\xff\xfd\n\xff\xfb\rbob\n", [b"bob"], b"\xff\xfc\n\xff\xfe\r"),
        (b"\xff\xfd\xff\xff\xfd\x01bob\n", [b"bob"], b"\xff\xfc\xff\xff\xfc\x01"),
        (b"\xff\xfa\x1f\0\n\0\xff\xff\n\xff\xf0bob\n", [b"bob"], b""),  # a subnegotiation
        (b"hi\xff\xf4\xff\xfd\x06\r\nthere\r\n", [b"hi", b"there"], b"\xff\xfc\x06"),  # IP, DO TIMING-MARK
        (b"\xff\xfd\x06\xff\xfd\x06", [], b"\xff\xfc\x06" * 2),
        (b"\xff\xf6bob\n", [b"bob"], b"*** Yes, the chat is here\r\n"),  # AYT
        (b"\xff\xf1\xff\xf9\xff\xecbob\n", [b"bob"], b""),  # NOP, GA, EOF
        (b"b\xff\xffb\xffb\n", [b"b\xffb\xffb"], b""),  # no UTF-8, and told so
        (b"\xff\xfa" + b"x" * 100 + b"\xff\xf0\n", [b"\xff\xfa" + b"x" * 100], b""),
    ]  # fmt: skip

    def test_it_is_no_text_and_is_answered_whole_and_byte_by_byte(self) -> None:
        for data, lines, answers in self.CASES:
            for size in (1, 2, 3, 1000):
                with self.subTest(data, size=size):
                    buffer, got = chat.TelnetBuffer(1000), []
                    for start in range(0, len(data), size):
                        got += buffer.feed_telnet(data[start : start + size])
                    self.assertEqual((got, bytes(buffer.answers)), (lines, answers))


class TextForm(unittest.TestCase):
    BOB = "bob!bob@host"
    CASES = [  # of bob, if there is no source
        ("PRIVMSG #chat :hello", "bob: hello"), ("NOTICE #chat :hello", "bob: hello"),
        ("PRIVMSG @#chat :x", "[@#chat] bob: x"), ("PRIVMSG +#a :\x01ACTION x\x01", "[+#a] * bob x"),
        ("PRIVMSG ann :psst", "[private] bob: psst"), ("PRIVMSG #chat :\x01ACTION waves\x01", "* bob waves"),
        (f"@{chat.COUNT_TAG}=3 :{BOB} JOIN #chat", "*** bob joined (3 here)"), ("JOIN #chat", "*** bob joined"),
        ("QUIT :Ping timeout", "*** bob left (Ping timeout)"), ("QUIT :Connection closed", "*** bob left"),
        ("QUIT :Quit: gone home", "*** bob left: gone home"), ("QUIT :\x07\x7f", "*** bob left (\\x07\\x7f)"),
        ("QUIT :Quit: (Ping timeout)", "*** bob left: (Ping timeout)"), ("QUIT :Quit: ", "*** bob left"),
        ("QUIT :Quit: Connection closed", "*** bob left: Connection closed"), ("QUIT :Quit:", "*** bob left"),
        ("QUIT", "*** bob left"), ("PART #chat", "*** bob left"), ("PART #chat :bye", "*** bob left: bye"),
        ("KICK #chat ann", "*** ann was kicked out by bob"), ("KICK #chat ann :bob", "*** ann was kicked out by bob"),
        ("KICK #chat ann :too loud", "*** ann was kicked out by bob: too loud"), ("MODE #chat +m", "*** bob set +m"),
        ("MODE #chat +o-v ann eve", "*** bob set +o-v ann eve"), ("INVITE ann #tea", "*** bob invited ann to #tea"),
        (":s 324 bob #chat +kn x", "*** The modes of #chat are: +kn x"), ("AWAY tea", ""),
        ("NICK rob", "*** bob is now rob"), ("TOPIC #chat tea", "*** bob set the topic: tea"),
        (":chat.local ERROR :Server is shutting down", "*** Server is shutting down"),
        (":chat.local NOTICE * hi", "*** hi"), (":s FAIL JOIN NO :not now", "*** Error: not now"),
        (":s WARN * SOON :a restart is due", "*** Warning: a restart is due"),
        (":s NOTE * NEWS :we have moved", "*** we have moved"), (":s 001 ann Welcome", ""), (":s PONG a b", ""),
        (f":chat.local 433 * bob :{chat.ERR_NICKNAMEINUSE.text}", "*** Error: that name is taken; choose another"),
        (":s 353 ann = #chat :@ann bob", "*** In #chat: @ann bob"),
        ("PRIVMSG #chat :\x1b[31mred\x9b\u202e", "bob: \\x1b[31mred\\x9b<U+202E>"),
        ("PRIVMSG #chat :你好\u3000世界\xa0\U0001fae8 a\u200db", "bob: 你好\u3000世界\xa0\U0001fae8 a<U+200D>b"),
        (f"@{chat.COUNT_TAG}=\x1b[2J :{BOB} JOIN #chat", "*** bob joined (\\x1b[2J here)"),
        ("PRIVMSG #chat :*** ann left {0}", "bob: *** ann left {0}"),
    ]  # fmt: skip

    def test_text_form(self) -> None:
        for line, text in self.CASES:
            with self.subTest(line):
                self.assertEqual(chat.text_form(chat.parse(line if line[0] in ":@" else f":{self.BOB} {line}")), text)

    def test_joiners_pass_where_they_are_needed(self) -> None:
        england = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
        for text in (
            "می\u200cخواهم",  # Persian
            "ශ්\u200dරී",  # Sinhala
            "क्\u200dष क्\u200cष",  # Hindi
            "র\u200d্যাব",  # Bengali
            "👨🏻\u200d❤\ufe0f\u200d💋\u200d👨🏼 🏳\ufe0f\u200d🌈 ☺\ufe0e 1\ufe0f\u20e3", england,
        ):  # fmt: skip
            with self.subTest(text):
                self.assertEqual(chat.escape_controls(text), text)
        for text, shown in (
            ("a\u200cb\u200d", "a<U+200C>b<U+200D>"), ("\u200dی\u200c", "<U+200D>ی<U+200C>"),
            ("ی\u200c\u200cی", "ی<U+200C><U+200C>ی"), ("👨\u200d\u200d👩\u200d", "👨<U+200D><U+200D>👩<U+200D>"),
            ("👨\u200da", "👨<U+200D>a"), ("bob\ufe0f: \ufe0f1\ufe0f", "bob<U+FE0F>: <U+FE0F>1<U+FE0F>"),
            (england[:-1], "\U0001f3f4<U+E0067><U+E0062><U+E0065><U+E006E><U+E0067>"),
            ("\U0001f3f4" + "\U000e0067" * 9 + "\U000e007f", "\U0001f3f4" + "<U+E0067>" * 9 + "<U+E007F>"),
            ("x" + england[1:3], "x<U+E0067><U+E0062>"), ("\u2065\U000e0002", "<U+2065><U+E0002>"),
            ("क" + "\u094d\u200d" * 6, "क" + "\u094d\u200d" * 4 + "<U+094D><U+200D>" * 2),  # nothing grows for ever
            ("\tx\ty", "    x    y"),
        ):  # fmt: skip
            with self.subTest(text):
                self.assertEqual(chat.escape_controls(text), shown)

    def test_long_runs_of_blanks_are_told(self) -> None:
        for text, shown in (
            ("x" + " " * 20 + "y", "x" + " " * 20 + "y"), ("x" + " " * 21 + "y", "x<21 blanks>y"),
            (" " * 160, "<160 blanks>"), ("\t\t\t\t\tif deep:", " " * 20 + "if deep:"),
            ("x" + "\t" * 6 + "y", "x<24 blanks>y"),
            ("x" + " \xa0\u3000\u2007\u2800\u1680\u205f" * 3 + "y", "x<21 blanks>y"),
            ("é" + " " * 10 + "\ufe0f" + " " * 10, "é" + " " * 10 + "<U+FE0F>" + " " * 10),
        ):  # fmt: skip
            with self.subTest(text):
                self.assertEqual(chat.text_form(Message("PRIVMSG", ("#chat", text), self.BOB)), f"bob: {shown}")
        for dialect in (chat.JSON, chat.irc()):  # are not read by people
            message = Message("PRIVMSG", ("#chat", "x" + " " * 99 + "y"), self.BOB)
            self.assertIn(b"x" + b" " * 99 + b"y", dialect.encode(message))

    def test_safe_param_is_one_word(self) -> None:
        for text, word in ((" :a b", "a"), ("\ta\tb", "a"), ("\t", "*"), ("", "*"), ("\x07b", "\\x07b")):
            self.assertEqual(chat.safe_param(text), word)

    def test_never_fails_for_missing_parameters(self) -> None:
        for command in [*chat.NUMERICS, *chat.EVENT_FORMS, "PRIVMSG", "ACK", "999", ""]:
            for params in ((), ("",), ("a", "{1}")):
                self.assertIsInstance(chat.text_form(Message(command, params, "x!y@z")), str)
                self.assertIsInstance(chat.text_form(Message(command, params)), str)

    def test_typed(self) -> None:
        for line, message in (
            ("hello", "PRIVMSG #x hello"), ("  indented", "PRIVMSG #x :  indented"), ("//slash", "PRIVMSG #x /slash"),
            ("/msg bob how are you", "PRIVMSG bob :how are you"), ("/NICK rob", "NICK rob"), ("/who", "NAMES #x"),
            ("/me waves at all", "PRIVMSG #x :\x01ACTION waves at all\x01"), ("/join #y", "JOIN #y"),
            ("/join #y key", "JOIN #y key"), ("/kick bob you know why", "KICK #x bob :you know why"),
            ("/invite bob", "INVITE bob #x"), ("/mode", "MODE #x"), ("/mode +ov bob ann", "MODE #x +ov bob ann"),
            ("/topic", "TOPIC #x"), ("/topic tea time", "TOPIC #x :tea time"), ("/quit", "QUIT"),
            ("/quit gone home", "QUIT :gone home"), ("/nick rob ", "NICK rob"), ("/whois bob  ", "WHOIS bob"),
            (" exit ", "QUIT"), ("exit now", "PRIVMSG #x :exit now"), ("/help", "HELP"), ("/help keys", "HELP keys"),
        ):  # fmt: skip
            with self.subTest(line):
                self.assertEqual(chat.parse_input(line, "#x"), chat.parse(message))

    def test_typed_wrongly(self) -> None:
        for line, text in (
            ("/dance", "/dance is not a command; /help lists them (//text sends a line with a slash)"),
            ("/msg bob", "it is /msg NAME TEXT"),
            ("/clear", "/clear is not a command; /help lists them (//text sends a line with a slash)"),
            ("/nick", "it is /nick NAME"),
        ):
            with self.subTest(line), self.assertRaises(chat.CommandError) as caught:
                chat.parse_input(line, "#x")
            self.assertEqual(caught.exception.params, (text,))


class Dialects(unittest.TestCase):
    def test_the_first_line_decides(self) -> None:
        for line, dialect in (
            (b'{"type":"join"}', chat.JSON), (b"NICK bob", chat.irc()), (b"cap LS 302", chat.irc()),
            (b"user a b c d", chat.irc()), (b"PASS x", chat.irc()), (b"PING x", chat.irc()), (b"NICK", chat.PLAIN),
            (b"nick ", chat.PLAIN), (b"Nicky", chat.PLAIN), (b"GET / HTTP/1.1", chat.Http),
            (b"POST /x HTTP/1.0", chat.Http), (b"bob", chat.PLAIN), (b"\xff\xfd\x01bob", chat.PLAIN), (b"", chat.PLAIN),
            (b"NICK / HTTP/1.1\r", chat.Http), (b"M-x / HTTP/1.1", chat.Http), (b"USER a 0 * :HTTP/1.1", chat.irc()),
        ):  # fmt: skip
            with self.subTest(line):
                found = chat.dialect_of(line)
                self.assertIn(dialect, (found, type(found)))

    def test_plain(self) -> None:
        join = [
            Message("NICK", ("bob",)), Message("USER", ("plain", "0", "*", "plain user")), Message("JOIN", ("#chat",)),
        ]  # fmt: skip
        self.assertEqual(chat.PLAIN.decode(b"bob", False), join)
        self.assertEqual(chat.PLAIN.decode(b" ", False), [])
        self.assertEqual(chat.PLAIN.decode(b"exit", False), [Message("QUIT")])
        self.assertEqual(chat.PLAIN.decode("é".encode(), True), [Message("PRIVMSG", ("*", "é"))])
        for line in (b"\xc3", b"a\rb", b"a\0b"):
            with self.subTest(line), self.assertRaises(chat.CommandError):
                chat.PLAIN.decode(line, True)

    def test_json_decode(self) -> None:
        for item, message in (
            ({"type": "chat", "text": "hi", "unknown": [1]}, Message("PRIVMSG", ("*", "hi"))),
            ({"type": "chat", "text": "hi", "ref": "7"}, Message("PRIVMSG", ("*", "hi"), "", {"label": "7"})),
            ({"type": "private", "to": "ann", "text": "psst"}, Message("PRIVMSG", ("ann", "psst"))),
            ({"type": "leave"}, Message("QUIT", ("",))),
            ({"type": "chat", "text": "[{" * 100}, Message("PRIVMSG", ("*", "[{" * 100))),
            ({"type": "chat", "text": "\nhi\n"}, Message("PRIVMSG", ("*", "hi"))),
            ({"type": "command", "text": "/who"}, Message("NAMES", ("*",))),
        ):
            with self.subTest(item):
                self.assertEqual(chat.JSON.decode(json.dumps(item).encode(), True), [message])
        self.assertEqual(chat.JSON.decode(b'{"type":"join"}', False)[0], Message("GUEST"))

    def test_json_refuses(self) -> None:
        for line in (
            b"{", b"{}", b"[1]", b'{"type":5}', b'{"type":[]}', b'{"type":"dance"}', b'{"type":"chat"}', b"\xff",
            b'{"type":"chat","text":5}', b'{"type":"command","text":"a\\nb"}', b'{"type":"chat","text":"a\\u0000b"}',
            b'{"type":"chat","text":"\\ud800"}', b'{"type":"chat","text":"a","ref":7}', b'{"a":' * 4000,
            b"[" * 4000, b'{"a":' + b"9" * 4000,
        ):  # fmt: skip
            with self.subTest(line[:40]), self.assertRaises(chat.CommandError):
                chat.JSON.decode(line, True)

    def test_patterns_take_linear_time(self) -> None:
        size = 1 << 20  # would take minutes if a search began anew at every place
        chat.JSON_STRING.sub("", '"' + '\\"' * size)
        for noise in (b"\xff\xfa", b"\xff\xfa" + b"x" * 20, b"\xff\xff", b"\r\xff"):
            chat.TelnetBuffer(10).feed_telnet(noise * (size // len(noise)))
        with self.assertRaises(chat.HttpError):
            chat.parse_request(b"GET http://" + b"a" * size)

    STAMP = {"id": "M", "time": "T"}
    TAGS = {"time": "T", "msgid": "M", chat.COUNT_TAG: "3"}
    BOB = TextForm.BOB
    JSON_OUT = [
        (Message("PRIVMSG", ("#chat", "hi"), BOB, TAGS), {
            "type": "chat", "user": "bob", "text": "hi", "channel": "#chat", **STAMP,
        }),
        (Message("PRIVMSG", ("#chat", "\x01ACTION waves\x01"), BOB, TAGS), {
            "type": "chat", "user": "bob", "text": "waves", "action": True, "channel": "#chat", **STAMP,
        }),
        (Message("PRIVMSG", ("ann", "hi"), BOB, TAGS), {
            "type": "private", "user": "bob", "text": "hi", "to": "ann", **STAMP,
        }),
        (Message("JOIN", ("#chat",), BOB, TAGS), {
            "type": "system", "event": "join", "user": "bob", "channel": "#chat", "text": "*** bob joined (3 here)",
            **STAMP,
        }),
        (Message("433", ("*", "bob", "that name is taken; choose another"), "s"), {
            "type": "error", "code": "name-taken", "text": "that name is taken; choose another",
        }),
        (Message("QUIT", ("Quit: #secret is gone",), BOB), {
            "type": "system", "event": "leave", "user": "bob", "text": "*** bob left: #secret is gone",
        }),
        (Message("INVITE", ("ann", "#tea"), BOB), {
            "type": "system", "event": "invite", "user": "bob", "channel": "#tea",
            "text": "*** bob invited ann to #tea",
        }),
        (Message("TOPIC", ("#tea", "Earl: Grey"), BOB), {
            "type": "system", "event": "topic", "user": "bob", "channel": "#tea", "topic": "Earl: Grey",
            "text": "*** bob set the topic: Earl: Grey",
        }),
        (Message("332", ("x", "#tea", "Grey"), "s"), {
            "type": "system", "event": "topic", "channel": "#tea", "topic": "Grey",
            "text": "*** The topic of #tea is: Grey",
        }),
        (Message("AWAY", ("lunch\x07",), BOB), {
            "type": "system", "event": "away", "user": "bob", "text": "*** bob is away: lunch\\x07",
        }),
        (Message("AWAY", (), BOB), {"type": "system", "event": "back", "user": "bob", "text": "*** bob is back"}),
        (Message("FAIL", ("PRIVMSG", "INVALID_UTF8", "no"), "s"), {
            "type": "error", "code": "invalid-utf8", "text": "no",
        }),
        (Message("ACK", (), "s", {**TAGS, "label": "7"}), {"type": "ack", "ref": "7", **STAMP}),
        (Message("353", ("x", "=", "#chat", "@ann bob"), "s"), {
            "type": "system", "event": "names", "users": ["ann", "bob"], "ranks": ["@", ""], "channel": "#chat",
            "text": "*** In #chat: @ann bob",
        }),
    ]  # fmt: skip

    def test_json_encode(self) -> None:
        for message, item in self.JSON_OUT:
            with self.subTest(message):
                line = chat.JSON.encode(message)
                self.assertTrue(line.endswith(b"}\n"))
                self.assertEqual(json.loads(line), item)
        self.assertEqual(chat.JSON.encode(Message("001", ("bob", "hi"), "s")), b"")

    def test_irc_tags_by_capability(self) -> None:
        message = Message("PRIVMSG", ("#c", "x"), "n!u@h", {"time": "T", "msgid": "M", "+a": "b c"})
        for caps, line in (
            ((), b":n!u@h PRIVMSG #c :x\r\n"), (("server-time",), b"@time=T :n!u@h PRIVMSG #c :x\r\n"),
            (("message-tags",), b"@msgid=M;+a=b\\sc :n!u@h PRIVMSG #c :x\r\n"),
            (("message-tags", "server-time"), b"@time=T;msgid=M;+a=b\\sc :n!u@h PRIVMSG #c :x\r\n"),
        ):  # fmt: skip
            self.assertEqual(chat.irc(frozenset(caps)).encode(message), line)
        self.assertEqual(chat.irc().encode(Message("TAGMSG", ("#c",), "n!u@h")), b"")
        joined = Message("JOIN", ("#c", "*", "Ann"), "n!u@h")
        self.assertEqual(chat.irc().encode(joined), b":n!u@h JOIN #c\r\n")
        self.assertEqual(chat.irc(frozenset({"extended-join"})).encode(joined), b":n!u@h JOIN #c * :Ann\r\n")
        away = Message("AWAY", ("tea",), "n!u@h", {chat.FOR_TAG: "away-notify"})
        self.assertEqual(chat.irc(frozenset({"message-tags"})).encode(away), b"")
        self.assertEqual(chat.irc(frozenset({"away-notify", "message-tags"})).encode(away), b":n!u@h AWAY tea\r\n")
        self.assertEqual(chat.irc().encode(chat.PROMPT), b"")

    def test_irc_line_lengths(self) -> None:
        irc = chat.irc()
        self.assertTrue(irc.decode(b"PING :" + b"x" * 504, True))
        self.assertTrue(irc.decode(b"@" + b"a" * 4094 + b" PING :" + b"x" * 504, True))
        for line in (b"PING :" + b"x" * 505, b"@" + b"a" * 4095 + b" PING x"):
            with self.assertRaises(chat.CommandError) as caught:
                irc.decode(line, True)
            self.assertEqual(caught.exception.numeric, chat.ERR_INPUTTOOLONG)


class HistoryCase(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = os.path.join(folder.name, "history")

    def sqlite(self, **more: Any) -> chat.SqliteHistory:
        history = chat.SqliteHistory(self.path, **more)
        self.addCleanup(history.close)
        return history

    @staticmethod
    def said(number: int, text: str = "x", **tags: str) -> Message:
        stamp = {"time": chat.server_time(number / 1e6), "msgid": f"{number:x}"}
        return Message("PRIVMSG", ("#chat", text), "bob!bob@host", {**stamp, **tags})

    def lines(self, history: chat.MemoryHistory, channel: str) -> list[int]:
        return [chat.sequence(item) for item in history.fetch(channel, 0, chat.MAX_SEQUENCE, chat.MAX_SEQUENCE, True)]


class Kept(HistoryCase):
    """What was said, in memory and in an SQLite file."""

    def test_pages_are_those_of_the_definition(self) -> None:
        """Of one log, and of several that are read together, in order."""
        rng = random.Random(5)
        names = ("#chat", "#chat 1f", "#chat 2f", "#chatter", "#empty")
        for history in (chat.MemoryHistory(), self.sqlite()):
            known: list[tuple[str, Message]] = []
            last = 0
            for _ in range(60):
                batch = []
                for _ in range(rng.randrange(1, 5)):
                    last += rng.randrange(1, 4)
                    batch.append((rng.choice(names[:-1]), self.said(last, f"text {last} ; é", **{"+x": "a b"})))
                history.append(batch)
                known += batch
                for count in (1, 2, 2, 3):
                    low, high, limit = rng.randrange(last), rng.randrange(last + 2), rng.randrange(8)
                    asked, newest = rng.sample(names, count), rng.random() < 0.5
                    within = [item for name, item in known if name in asked and low < chat.sequence(item) < high]
                    expected = within[max(len(within) - limit, 0) :] if newest else within[:limit]
                    self.assertEqual(history.fetch_all(asked, low, high, limit, newest), expected)
                    if count == 1:
                        self.assertEqual(history.fetch(asked[0], low, high, limit, newest), expected)
            self.assertEqual(history.last_sequence(), last)
            if isinstance(history, chat.SqliteHistory):
                of_channel = [chat.sequence(item) for name, item in known if name != "#chatter"]
                self.assertEqual([chat.sequence(item) for item in history.transcript(0, "#chat")], of_channel)

    def test_memory_is_bounded(self) -> None:
        history = chat.MemoryHistory()
        history.append([("#chat", self.said(number)) for number in range(1, chat.MEMORY_LINES + 11)])
        found = self.lines(history, "#chat")
        self.assertEqual((found[0], len(found)), (11, chat.MEMORY_LINES))
        for number in range(chat.MEMORY_TOTAL // chat.MEMORY_LINES):
            history.append([(f"#{number}", self.said(line)) for line in range(chat.MEMORY_LINES)])
        self.assertEqual(self.lines(history, "#chat"), [])
        self.assertLessEqual(sum(len(self.lines(history, f"#{number}")) for number in range(100)), chat.MEMORY_TOTAL)

    def test_what_is_long_counts_for_more(self) -> None:
        history = chat.MemoryHistory()
        history.in_use = lambda channel: True
        with mock.patch.object(chat, "MEMORY_TOTAL", 100):
            for number in range(100):
                history.append([("#chat", self.said(number, "x" * (number % 2) * chat.MULTILINE_BYTES))])
            self.assertLessEqual(len(self.lines(history, "#chat")), 2 * 100 // 9)
            history.remove(["#chat"], 99)
            for number in range(100, 500):
                history.append([("#chat", self.said(number))])
            self.assertGreaterEqual(len(self.lines(history, "#chat")), 90)

    def test_several_lines_are_one_row_of_one_line(self) -> None:
        """So an older server, or another program, that reads the file takes none of them for a message."""
        lines = [chat.Line(text, text == "+") for text in ("a", "", "*** b left", "+", " :x", "e\u0301 1,+2", "")]
        message = chat.join_lines(self.said(1), lines)
        for history in (chat.MemoryHistory(), self.sqlite()):
            history.append([("#chat", message)])
            (found,) = history.fetch("#chat", 0, 9, 9, True)
            self.assertEqual((found, chat.split_lines(found)), (message, lines))
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            ((row,),) = db.execute("SELECT line FROM said")
        self.assertFalse(set("\r\n") & set(row), row)
        self.assertEqual(chat.whole_text(message), "a\n\n*** b left+\n :x\ne\u0301 1,+2\n")
        for as_json in ("", "--json"):
            out = io.TextIOWrapper(io.BytesIO(), "utf-8")
            with mock.patch.object(sys, "stdout", out):
                chat.run_history(chat.parser().parse_args(["history", self.path, *as_json.split()]))
                out.flush()
            told = out.buffer.getvalue().decode().splitlines()
            if as_json:
                self.assertEqual([json.loads(line)["text"] for line in told], [chat.whole_text(message)])
            else:
                texts = ["a", "*** b left", "+", " :x", "e\u0301 1,+2"]
                self.assertEqual([line.partition(" #chat ")[2] for line in told], [f"bob: {text}" for text in texts])

    def test_a_channel_with_members_is_never_forgotten(self) -> None:
        history = chat.MemoryHistory()
        history.in_use = {"#chat"}.__contains__
        with mock.patch.object(chat, "MEMORY_TOTAL", 100):
            for turn, name in enumerate(("#chat", "#a", "#b", "#a"), 1):
                history.append([(name, self.said(turn * 100 + line)) for line in range(20)])
            for number in range(25):
                history.append([(f"#{number}", self.said(1))])
            left = {name: len(self.lines(history, name)) for name in ("#chat", "#a", "#b", "#24")}
            self.assertEqual(left, {"#chat": 20, "#a": 40, "#b": 0, "#24": 1})  # #b was not used for longest
            history.in_use = lambda channel: True
            for number in range(200):
                history.append([(f"#{number % 20}", self.said(500 + number))])
            left = {name: len(self.lines(history, name)) for name in ("#chat", *(f"#{number}" for number in range(20)))}
            self.assertLessEqual(sum(left.values()), 100)
            self.assertGreaterEqual(min(left.values()), 4)

    def test_all_or_nothing(self) -> None:
        history = self.sqlite()
        history.append([("#chat", self.said(1))])
        with self.assertRaises(chat.StorageError):
            history.append([("#chat", self.said(2)), ("#chat", self.said(1))])
        self.assertEqual(len(history.fetch("#chat", 0, chat.MAX_SEQUENCE, 9, True)), 1)
        history.append([("#chat", self.said(3))])
        self.assertEqual(len(history.fetch("#chat", 0, chat.MAX_SEQUENCE, 9, True)), 2)

    def test_what_is_removed_is_in_no_page_and_under_no_key(self) -> None:
        keys = {number: ("bob's", f"{number}", "#chat") for number in (1, 2, 3)}
        for history in (chat.MemoryHistory(), self.sqlite()):
            for number, name in enumerate(("#chat", "#chat 1f", "#chat"), 1):
                tags = {chat.ID_TAG: f"{number}", chat.BY_TAG: "bob's"}
                history.append([(name, self.said(number, **tags))])
            history.remove(("#chat", "#chat 1f"), 2)
            history.remove(("#chat", "#nowhere"), 2)  # no longer there
            history.remove(("#chat 1f",), 1)  # in another one
            self.assertEqual((self.lines(history, "#chat"), self.lines(history, "#chat 1f")), ([1, 3], []))
            self.assertEqual([*history.find(list(keys.values()))], [keys[1], keys[3]])
            history.remove(("#chat",), 3)
            history.append([("#chat 1f", self.said(4))])
            self.assertEqual((self.lines(history, "#chat"), self.lines(history, "#chat 1f")), ([1], [4]))
        self.assertEqual(self.lines(self.sqlite_again(history), "#chat"), [1])

    def test_what_is_old_is_removed_bit_by_bit(self) -> None:
        now = int(time.time() * 1e6)
        history, size = self.sqlite(days=1), chat.PRUNE_LINES + 5
        old = [(f"#{number}", self.said(now - 90_000 * 1_000_000 + number)) for number in range(size)]
        history.append([*old, ("#5", self.said(now))])
        for left in (6, 1, 1):
            history.prune()
            self.assertEqual(len(list(history.transcript(0))), left)

    def test_lines_by_their_own_time(self) -> None:
        """The clock was set back by an hour after two lines: the others have higher numbers all the same."""
        noon, hour = 1769860800_000_000, 3600_000_000
        own = [noon, noon + hour // 2, noon - hour // 2, noon, noon + hour]
        numbers = [own[0], own[1], own[1] + 1, own[1] + 2, own[4]]
        said = [self.said(number, time=chat.server_time(at / 1e6)) for number, at in zip(numbers, own)]
        for history in (chat.MemoryHistory(), self.sqlite()):
            history.append([("#chat", item) for item in said])
            for low, limit, newest, wanted in (
                (noon - 1, 9, False, [0, 1, 3, 4]), (noon - 1, 3, False, [0, 1, 3]), (noon - 1, 2, True, [3, 4]),
                (noon + 999, 9, False, [1, 4]), (noon - hour, 9, False, [0, 1, 2, 3, 4]),
            ):  # fmt: skip
                since = chat.server_time((low + 1) / 1e6)
                found = history.fetch("#chat", low, chat.MAX_SEQUENCE, limit, newest, since)
                self.assertEqual([said.index(item) for item in found], wanted)
            self.assertEqual(history.fetch("#chat", noon - 1, chat.MAX_SEQUENCE, 9, False), said)
        for channel in ("", "#chat"):
            found = list(self.sqlite_again(history).transcript(noon / 1e6, channel))
            self.assertEqual([said.index(item) for item in found], [0, 1, 3, 4])

    def sqlite_again(self, history: chat.MemoryHistory) -> chat.SqliteHistory:
        history.close()
        return self.sqlite(readonly=True)

    def test_ids_after_the_clock_was_set_back(self) -> None:
        history = chat.MemoryHistory()
        ahead = int(time.time() * 1e6) + 86_400_000_000
        history.append([("#chat", self.said(ahead))])
        self.assertGreater(chat.Hub("s", history).ids.last, ahead + 1_000_000)

    def test_references(self) -> None:
        for text, span in (
            ("msgid=1f", (31, 31)), ("timestamp=1970-01-01T00:00:01.002Z", (1_002_000, 1_002_999)),
            ("timestamp=2026-01-31T12:00:00.000Z", (1769860800000000, 1769860800000999)),
        ):  # fmt: skip
            self.assertEqual(chat.parse_reference(text), span)
        for text in (
            "", "*", "msgid=", "msgid=xyz", "msgid=" + "f" * 16, "timestamp=now", "timestamp=2026-13-01T00:00:00.000Z",
        ):  # fmt: skip
            with self.assertRaises(ValueError):
                chat.parse_reference(text)


class HistoryFiles(HistoryCase):
    """The file, whatever becomes of it."""

    def test_a_file_outlives_its_server(self) -> None:
        first = self.sqlite()
        first.append([("#chat", self.said(7, "hello", **{chat.ID_TAG: "1", chat.BY_TAG: "bob's"}))])
        if os.name == "posix":
            for path in pathlib.Path(self.path).parent.iterdir():
                self.assertEqual(path.stat().st_mode & 0o777, 0o600, path)
        first.close()
        second = self.sqlite(fsync=True)
        self.assertEqual(second.fetch("#chat", 0, chat.MAX_SEQUENCE, 9, True)[0].text, "hello")
        hub = chat.Hub("s", second)
        keys = [(by, number, to) for by in ("bob's", "ann's") for number in "12" for to in ("#chat", "#tea")]
        self.assertEqual(list(second.find(keys * 50)), [("bob's", "1", "#chat")])
        self.assertGreater(int(hub.ids.next()["msgid"], 16), 7)

    def test_files_that_are_no_history(self) -> None:
        path = pathlib.Path(self.path)
        history = self.sqlite()
        history.append([("#chat", self.said(number, "x" * 400)) for number in range(1, 500)])
        history.close()
        good = path.read_bytes()
        foreign = sqlite3.connect(f"{self.path}2")
        foreign.execute("CREATE TABLE cats (name)")
        foreign.close()
        for data, text in (
            (b"this is a diary\n" * 100, "file is not a database"),
            (pathlib.Path(f"{self.path}2").read_bytes(), "it belongs to another program"),
            (good[: len(good) // 2], ""),  # torn
            (good[:5000] + bytes(3000) + good[8000:], ""),
        ):
            path.write_bytes(data)
            with self.assertRaises(chat.StorageError) as caught:
                self.sqlite()
            self.assertIn(f"cannot use {self.path} as a history: {text}", str(caught.exception))
        with self.assertRaises(chat.StorageError):
            chat.SqliteHistory(os.path.join(self.path, "no", "such"))

    def test_damaged_lines_are_left_out(self) -> None:
        history = self.sqlite()
        history.append([("#chat", self.said(number)) for number in (1, 2, 3)])
        other = sqlite3.connect(self.path)
        other.execute("UPDATE said SET line = replace(line, 'msgid', 'msgie') WHERE number = 1")
        other.execute("UPDATE said SET line = replace(line, 'time', 'tyme') WHERE number = 2")
        other.commit()
        other.close()
        found = history.fetch("#chat", 0, chat.MAX_SEQUENCE, 9, True)
        self.assertEqual([chat.sequence(item) for item in found], [3])
        self.assertEqual(history.last_sequence(), 3)

    @MOVES_OPEN_FILES
    def test_a_file_that_is_no_longer_the_one_is_noticed(self) -> None:
        change: Callable[[], None]

        def replace() -> None:
            os.rename(self.path, f"{self.path}.1")
            shutil.copy(f"{self.path}.1", self.path)

        for change, why in (
            (lambda: os.remove(self.path), "is gone"), (lambda: os.rename(self.path, f"{self.path}.1"), "is gone"),
            (lambda: os.unlink(f"{self.path}-wal"), "is gone"), (replace, "is another file now"),
            (lambda: os.truncate(self.path, 0), "was truncated"),
            (lambda: os.truncate(f"{self.path}-wal", 0), "was truncated"),
        ):  # fmt: skip
            history = self.sqlite()
            history.append([("#chat", self.said(1, "x" * 10_000))])
            change()
            for number in (2, 3):
                with self.assertRaises(chat.StorageError) as caught:
                    history.append([("#chat", self.said(number))])
                self.assertEqual(str(caught.exception), f"{os.path.realpath(self.path)} {why}; start the server again")
            history.close()
            for path in pathlib.Path(self.path).parent.iterdir():
                path.unlink()

    def test_another_program_may_empty_the_write_ahead_log(self) -> None:
        history = self.sqlite()
        history.append([("#chat", self.said(1))])
        other = sqlite3.connect(self.path)
        self.assertEqual(other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0], 0)
        other.close()
        self.assertEqual(os.path.getsize(f"{self.path}-wal"), 0)
        history.append([("#chat", self.said(2))])
        self.assertEqual(self.lines(history, "#chat"), [1, 2])

    @MOVES_OPEN_FILES
    def test_two_servers_do_not_share_a_file(self) -> None:
        first = self.sqlite()
        os.symlink(self.path, f"{self.path}2")
        for path in (self.path, f"{self.path}2"):
            with self.assertRaises(chat.StorageError) as caught:
                chat.SqliteHistory(path)
            self.assertEqual(str(caught.exception), f"cannot use {path} as a history: another server uses it")
        self.assertEqual(list(self.sqlite(readonly=True).transcript(0)), [])
        first.append([("#chat", self.said(1))])
        first.close()
        self.assertEqual(self.lines(self.sqlite(), "#chat"), [1])

    def test_files_of_older_servers(self) -> None:
        """They had one table; what may be sent again is recognised in them, too."""
        old = sqlite3.connect(self.path)
        old.executescript(
            f"PRAGMA application_id = {chat.SQLITE_ID}; PRAGMA journal_mode = WAL;"
            "CREATE TABLE said (channel TEXT, number INTEGER, line TEXT, PRIMARY KEY (channel, number)) WITHOUT ROWID"
        )
        message = self.said(7, "hello", **{chat.ID_TAG: "1", chat.BY_TAG: "bob's"})
        old.execute("INSERT INTO said VALUES ('#chat', 7, ?)", (chat.format_tagged(message),))
        old.commit()
        old.close()
        self.assertEqual(list(self.sqlite(readonly=True).transcript(0)), [chat.strip_private_tags(message)])
        for _ in range(2):
            history = self.sqlite()
            key = ("bob's", "1", "#chat")
            self.assertEqual((history.find([key]), history.last_sequence()), ({key: message}, 7))
            history.close()

    def test_starting_takes_no_longer_with_many_channels(self) -> None:
        """Counts SQLite's steps, not time."""
        steps: list[int] = []
        connect: Any = chat.SqliteHistory._connect

        def counted(*args: Any) -> Any:
            db = connect(*args)
            db.set_progress_handler(functools.partial(steps.append, 1), 10)
            return db

        taken = []
        for count in (10, 1000):
            history = self.sqlite()
            history.append([(f"#{number}", self.said(count * 1000 + number)) for number in range(count)])
            history.append([], [chat.ChannelState(f"#{number}", "") for number in range(count)])
            history.close()
            with mock.patch.object(chat.SqliteHistory, "_connect", counted), mock.patch.object(
                chat, "CHECKED_BYTES", 0
            ):
                steps.clear()
                again = self.sqlite()
                self.assertEqual(chat.Hub("s", again).ids.last, count * 1000 + count - 1)
                taken.append(len(steps))
                again.close()
        self.assertLessEqual(taken[1], taken[0] + 10)

    def test_too_many_saved_channels(self) -> None:
        """Those saved last are restored."""
        history = self.sqlite()
        names = [f"#{number}" for number in range(5)]
        history.append([(name, self.said(number)) for number, name in enumerate(names, 1)])
        history.append([], [chat.ChannelState(name, f"state of {name}") for name in names])
        with mock.patch.object(chat, "SAVED_CHANNELS", 3):
            self.assertEqual(history.states(), {name: f"state of {name}" for name in names[2:]})
        self.assertEqual(history.states(), {name: f"state of {name}" for name in names[2:]})

    def test_reading_changes_nothing(self) -> None:
        path = pathlib.Path(self.path)
        path.write_bytes(b"")
        chat.SqliteHistory(self.path, readonly=True).close()
        self.assertEqual(path.read_bytes(), b"")


class State(unittest.TestCase):
    """The log and its fan-out against a model that does it the slow and obvious way."""

    DIALECTS = (chat.PLAIN, chat.JSON, chat.irc(), chat.irc(frozenset({"server-time"})))

    def test_fan_out_matches_the_obvious_way(self) -> None:
        for seed in range(1000):
            with self.subTest(seed=seed):
                self.fan_out_once(random.Random(seed))

    def fan_out_once(self, rng: random.Random) -> None:
        hub = chat.Hub("s")
        sessions = [self.session(f"u{number}", rng.choice(self.DIALECTS)) for number in range(rng.randint(1, 12))]
        channels = [chat.Channel(f"#{name}") for name in "abc"[: rng.randint(1, 3)]]
        expected: dict[chat.Session, list[bytes]] = {session: [] for session in sessions}
        got: dict[chat.Session, bytes] = {session: b"" for session in sessions}
        for step in range(rng.randint(1, 60)):
            session, channel = rng.choice(sessions), rng.choice(channels)
            message = Message("PRIVMSG", (channel.name, str(step)), session.prefix, {"time": "T"})
            call, kind = chat.Call(hub, session), rng.random()
            if kind < 0.1:
                call.set_dialect(rng.choice(self.DIALECTS))
            elif kind < 0.3 and session not in channel.members:
                call.join(channel)
            elif kind < 0.45 and session in channel.members:
                call.leave(session, *{channel, *rng.sample(list(session.channels), len(session.channels) // 2)})
            elif kind < 0.6:
                call.send_to(session, message)
                expected[session].append(session.dialect.encode(message))
            elif kind < 0.9:
                echo = rng.random() < 0.5
                several = {channel, *rng.sample(channels, rng.randint(0, len(channels)))}
                call.broadcast(message, *several, echo=echo)
                for member in sessions:
                    if several & member.channels.keys() and (echo or member is not session):
                        expected[member].append(member.dialect.encode(message))
            else:
                self.collect(hub, got)
            hub.append(call)
        self.collect(hub, got)
        self.assertEqual(got, {session: b"".join(lines) for session, lines in expected.items()})
        for channel in channels:
            audience = [(member, dialect) for dialect, group in channel.audience.items() for member in group]
            self.assertEqual(dict(audience), {member: member.dialect for member in channel.members})
            self.assertEqual(len(audience), len(channel.members))

    @staticmethod
    def session(nick: str, dialect: chat.Dialect = chat.PLAIN) -> chat.Session:
        session = chat.Session("h", 0.0)
        session.nick, session.prefix, session.stage = nick, f"{nick}!u@h", chat.Stage.REGISTERED
        session.dialect = session.output = dialect
        return session

    def collect(self, hub: chat.Hub, got: dict[chat.Session, bytes]) -> None:
        seen: set[chat.Session] = set()
        for data, sessions, count in chat.FanOut(chat.commit(hub, hub.drain_log())).payloads():
            self.assertEqual(data.count(b"\n"), count)
            for session in sessions:
                self.assertNotIn(session, seen, "two sends to one recipient")
                seen.add(session)
                got[session] += data

    def test_a_message_is_encoded_once_per_dialect(self) -> None:
        hub, channel = chat.Hub("s"), chat.Channel("#a")
        dialect = mock.Mock(wraps=chat.irc(), caps=frozenset())
        call = [self.join(hub, self.session(f"u{number}", dialect), channel) for number in range(50)][-1]
        chat.FanOut(chat.commit(hub, hub.drain_log()))
        call = chat.Call(hub, call.session)
        for number in range(3):
            call.broadcast(Message("PRIVMSG", ("#a", str(number)), "x!y@z"), channel, echo=False)
        hub.append(call)
        payloads = list(chat.FanOut(chat.commit(hub, hub.drain_log())).payloads())
        self.assertEqual([len(sessions) for data, sessions, _ in payloads if data], [49])
        self.assertEqual(dialect.encode.call_count, 3)

    @staticmethod
    def join(hub: chat.Hub, session: chat.Session, *channels: chat.Channel) -> chat.Call:
        call = chat.Call(hub, session)
        for channel in channels:
            call.join(channel)
        hub.append(call)
        return call

    def test_leaving_together_takes_no_longer_for_those_in_two_channels(self) -> None:
        """Counts steps, not time: effects of a quit may not grow with the number of members."""
        hub, channels = chat.Hub("s"), [chat.Channel("#a"), chat.Channel("#b")]
        sessions = [self.session(f"u{number}", chat.irc()) for number in range(400)]
        for session in sessions:
            hub.sessions[session] = None
            self.join(hub, session, *channels)
        chat.FanOut(chat.commit(hub, hub.drain_log()))
        for session in sessions[:100]:
            call = chat.Call(hub, session)
            call.quit(session, "gone", "")
            hub.append(call)
        effects = chat.commit(hub, hub.drain_log())
        # For each: what changes, the QUIT, the end of its connection; the first was operator of both.
        self.assertEqual(len(effects), 302)
        init = chat.Feed.__init__
        with mock.patch.object(chat.Feed, "__init__", autospec=True, side_effect=init) as feeds:
            payloads = list(chat.FanOut(effects).payloads())
        sent = {session: len(data.splitlines()) for data, group, _ in payloads for session in group}
        self.assertEqual({sent[session] for session in sessions[100:]}, {100})
        self.assertEqual([sent[session] for session in sessions[:100]], list(range(100)))
        self.assertIn(feeds.call_count, range(1, 5))

    def test_an_answer_in_the_same_tick_of_the_clock_is_an_answer(self) -> None:
        hub, session = chat.Hub("s"), self.session("bob", chat.irc())
        with hub:
            call = chat.Call(hub, session)
            call.ping(session, 100.0, 60.0)
            session.last_received = 100.0
            self.assertEqual(chat.check_timeouts(call, 160.0), 190.0)
        self.assertIs(session.stage, chat.Stage.REGISTERED)

    def test_errors_wait_until_the_log_is_not_full_like_everything_else(self) -> None:
        hub, session = chat.Hub("s"), chat.Session("h", 0.0)
        hub.sessions[session] = None
        with mock.patch.object(hub.not_full, "wait") as wait:
            for line in (b"\xff", b"bob", None):
                chat.handle_line(hub, session, line)
        self.assertEqual(wait.call_count, 3)

    def test_calls_count_in_the_log_whatever_they_do(self) -> None:
        hub, session = chat.Hub("s"), self.session("bob", chat.irc(frozenset({"batch", "labeled-response"})))
        for number in range(100):
            chat.handle_line(hub, session, b"@label=x PONG y")
            self.assertEqual(hub.log_length, number + 1)
        hub.drain_log()
        self.assertEqual(hub.log_length, 0)

    def test_one_query_at_a_time_is_in_the_log(self) -> None:
        hub, answered = chat.Hub("s"), threading.Semaphore(0)
        sessions = [self.session(f"u{number}", chat.irc()) for number in range(5)]

        def ask(session: chat.Session) -> None:
            chat.handle_line(hub, session, b"LUSERS")
            answered.release()

        for session in sessions:
            threading.Thread(target=ask, args=(session,), daemon=True).start()
        for _ in sessions:
            self.assertTrue(answered.acquire(timeout=PATIENCE))
            chat.handle_line(hub, sessions[0], b"PING x")  # does not wait
            calls = [call.message.command for call in hub.drain_log()]
            self.assertEqual(calls, ["LUSERS", "PING"])

    def test_batches_begin_where_they_were_negotiated(self) -> None:
        hub, session = chat.Hub("s"), self.session("bob", chat.irc())
        hub.nicks["bob"] = session
        session.send = lambda data, flags: len(data)
        with mock.patch.object(hub.idle, "wait"):  # for the mailer, between two queries
            for line in ("JOIN #a", "CHATHISTORY LATEST #a * 5", "CAP REQ :batch", "CHATHISTORY LATEST #a * 5"):
                chat.handle_line(hub, session, line.encode())
        got: dict[chat.Session, bytes] = {session: b""}
        self.collect(hub, got)
        lines = [chat.parse(line).command for line in got[session].decode().splitlines()]
        self.assertEqual(lines[-3:], ["CAP", "BATCH", "BATCH"])
        self.assertNotIn("BATCH", lines[:-3])

    def test_nobody_waits_for_a_mailer_that_is_no_more(self) -> None:
        hub, session = chat.Hub("s"), self.session("bob", chat.irc())
        line = functools.partial(chat.handle_line, hub, session, b"PING x")
        with mock.patch.object(chat, "LOG_ENTRIES", 1), at_once(*[line] * 5):
            hub.closed = True
            hub.drain_log()

    def test_names_are_kept_in_step(self) -> None:
        channel, rng = chat.Channel("#a"), random.Random(2)
        for number in range(200):
            channel.add(self.session(f"user{number}"))
            if number % 3 == 2:
                channel.remove(rng.choice(list(channel.members)))
            names = " ".join(channel.names()).split()
            self.assertEqual(names, [chat.SIGNS[rank] + member.nick for member, rank in channel.members.items()])
            self.assertLessEqual(max(len(text.encode()) for text in channel.names()), chat.NAMES_BYTES)
            names = " ".join(channel.names(frozenset({"userhost-in-names", "server-time"}))).split()
            self.assertEqual([name.lstrip("@") for name in names], [member.prefix for member in channel.members])

    def test_an_empty_channel_holds_nobody(self) -> None:
        hub, channel = chat.Hub("s"), chat.Channel("#a")  # an invitation to it may hold the channel
        call = chat.Call(hub, self.session("bob"))
        call.join(channel)
        call.leave(call.session, channel)
        hub.append(call)
        chat.FanOut(chat.commit(hub, hub.drain_log()))
        self.assertEqual((channel.members, channel.audience, call.session.audiences, hub.channels), ({}, {}, (), {}))


class StateParts(unittest.TestCase):
    """Turnstiles, token buckets, message ids: what the hub is made of."""

    def test_a_turnstile_lets_through_one_after_another(self) -> None:
        lock, is_open = threading.Lock(), False
        through: list[int] = []
        turnstile = chat.Turnstile(lock, lambda: is_open)

        def wait(number: int) -> None:
            with lock:
                started.release()
                turnstile.wait()
                through.append(number)

        started = threading.Semaphore(0)
        threads = [threading.Thread(target=wait, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
            started.acquire()
        with lock:
            turnstile.wake()  # too early: who is woken waits on
        with lock:
            self.assertEqual(through, [])
            is_open = True
            turnstile.wake()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(sorted(through), list(range(5)))

    def test_token_bucket(self) -> None:
        bucket = chat.TokenBucket(3, 10.0)
        self.assertEqual([bucket.allow(100.0) for _ in range(5)], [True, True, True, False, False])
        self.assertEqual([bucket.allow(110.5), bucket.allow(110.5)], [True, False])
        self.assertEqual([bucket.debit(110.5), bucket.debit(110.5)], [9.5, 19.5])

    def test_an_operator_is_awaited_once(self) -> None:
        """Who speaks from two windows, and then is operator no more, does not get it back by the second."""
        channel = chat.Channel("#tea")
        for token in ("t", "t", "", ""):
            session = chat.Session("h", 0.0)
            session.token = token
            channel.add(session, "o")
        for _ in range(2):
            channel = chat.Channel.restored(channel.state())
            self.assertEqual(channel.operators, ["t", ""])

    def test_message_ids_grow_whatever_the_clock_does(self) -> None:
        ids = chat.MessageIds()
        for moment in (1000.0, 1000.0, 999.0, 2000.0, 0.5):
            with mock.patch.object(chat.time, "time", lambda moment=moment: moment):  # type: ignore[attr-defined]
                before, tags = ids.last, ids.next()
            self.assertGreater(int(tags["msgid"], 16), before)
            self.assertEqual(tags["time"], chat.server_time(moment))
        self.assertGreater(int(chat.MessageIds(ids.last).next()["msgid"], 16), ids.last)


class Peer:
    """A raw connection to a server under test."""

    def __init__(self, port: int, data: str = "", sock: socket.socket | None = None) -> None:
        self.sock = sock or socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.sock.settimeout(PATIENCE)
        self.buffer = b""
        self.seen: list[str] = []
        if data:
            self.send(data)

    def send(self, data: str) -> None:
        self.sock.sendall(data.encode())

    def line(self) -> str | None:
        """The next line without its end; None when the connection has ended."""
        while b"\n" not in self.buffer:
            try:
                data = self.sock.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        self.seen.append(line.decode().rstrip("\r"))
        return self.seen[-1]

    def until(self, wanted: str) -> str:
        """Reads up to the first line that contains `wanted`, and returns it."""
        while True:
            line = self.line()
            if line is None:
                raise AssertionError(f"{wanted!r} never came, but {self.seen[-10:]}")
            if wanted in line:
                return line

    def take(self, end: bytes) -> bytes:
        """The bytes up to the first `end`."""
        while end not in self.buffer:
            data = self.sock.recv(65536)
            if not data:
                raise AssertionError(f"{end!r} never came, but {self.buffer!r}")
            self.buffer += data
        before, _, self.buffer = self.buffer.partition(end)
        return before + end

    def rest(self) -> list[str]:
        """All lines up to the end of the connection, for whose other half nobody then has to wait."""
        lines = list(iter(self.line, None))
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        return lines

    def unread(self) -> int:
        """How many bytes have arrived and are not read."""
        with socket.fromfd(self.sock.fileno(), self.sock.family, self.sock.type) as below:  # below TLS
            below.setblocking(False)
            return len(below.recv(1 << 24, socket.MSG_PEEK))

    def sync(self) -> list[str]:
        """IRC: everything that the server had sent before it answered a PING."""
        token = f"sync{random.random()}"
        self.send(f"PING {token}\r\n")
        start = len(self.seen)
        self.until(token)
        return self.seen[start:-1]

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Ends the connection as a loss does."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class WebPeer(Peer):
    """The client's end of a WebSocket, to a server under test."""

    def __init__(self, port: int, *headers: str, sock: socket.socket | None = None) -> None:
        super().__init__(port, sock=sock)
        self.pongs: list[bytes] = []
        self.code = 0  # of the close frame that came
        lines = ["GET / HTTP/1.1", "Host: localhost", "Upgrade: WebSocket", "Connection: keep-alive, upgrade"]
        lines += ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", *headers]
        self.send("\r\n".join([*lines, "", ""]))
        self.head = self.take(b"\r\n\r\n").decode().splitlines()

    def say(self, text: str | bytes | dict[str, Any], opcode: int = chat.WS_TEXT, first: int = 0x80) -> None:
        """Sends a frame."""
        text = json.dumps(text) if isinstance(text, dict) else text
        self.sock.sendall(masked(text.encode() if isinstance(text, str) else text, opcode, first))

    def line(self) -> str | None:
        """The text of the next message; None when the connection has ended."""
        while True:
            opcode, data = self.frame()
            if opcode in (chat.WS_TEXT, chat.WS_BINARY):
                self.seen.append(data.decode())
                return self.seen[-1]
            if opcode == chat.WS_PONG:
                self.pongs.append(data)
            if opcode == chat.WS_CLOSE:
                self.code = int.from_bytes(data[:2], "big")
            if opcode < 0:
                return None

    def frame(self) -> tuple[int, bytes]:
        """The opcode and the payload of the next frame; -1 at the end."""
        head = self.exactly(2)
        if not head:
            return -1, b""
        size = head[1] if head[1] < 126 else int.from_bytes(self.exactly(2 if head[1] == 126 else 8), "big")
        assert head[0] & 0xF0 == 0x80 and head[1] < 128, head
        return head[0] & 15, self.exactly(size)

    def exactly(self, size: int) -> bytes:
        """So many bytes, or none at the end."""
        while len(self.buffer) < size:
            data = self.sock.recv(65536)
            if not data:
                assert not self.buffer, self.buffer
                return b""
            self.buffer += data
        found, self.buffer = self.buffer[:size], self.buffer[size:]
        return found

    def json(self, kind: str) -> dict[str, Any]:
        """The next message of a type, or the next event."""
        while True:
            item: dict[str, Any] = json.loads(self.until(f'"{kind}"'))
            if kind in (item["type"], item.get("event")):
                return item


def masked(data: bytes, opcode: int, first: int = 0x80, mask: bytes = b"\x37\xfa\x21\x3d") -> bytes:
    """A frame of a client."""
    head = bytearray(chat.frame(opcode, data)[: -len(data) or None])
    head[0] = first | opcode
    head[1] |= 0x80
    return bytes(head) + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))


@contextlib.contextmanager
def at_once(*calls: Callable[[], object]) -> Iterator[None]:
    """Runs each call in a thread meanwhile; all must end."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join(PATIENCE)
    if any(thread.is_alive() for thread in threads):
        raise AssertionError("a thread does not end")


class Waiting(unittest.TestCase):
    """Waits for what is about to happen."""

    def eventually(self, condition: Callable[[], Any], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            self.assertLess(time.monotonic(), end, what)
            time.sleep(0.01)


class ServerCase(Waiting):
    """A server in this process, on a free port."""

    def setUp(self) -> None:
        self.serve(chat.Server("127.0.0.1", 0))

    def serve(self, server: chat.Server) -> None:
        """Begins a server, and ends it after the test."""
        self.server, self.port = server, server.address[1]
        self.watcher: Peer | None = None
        self.thread = threading.Thread(target=server.serve)
        self.thread.start()
        self.addCleanup(self.stop, self.server, self.thread)

    def stop(self, server: chat.Server, thread: threading.Thread) -> None:
        server.stop()
        thread.join(PATIENCE)
        self.assertFalse(thread.is_alive(), "the server did not stop")

    @contextlib.contextmanager
    def logs(self, least: int = logging.INFO) -> Iterator[list[str]]:
        """What is logged meanwhile, with its level, which is `least` or higher; something has to be."""
        found: list[str] = []

        def log_later(level: int, text: str, *values: object) -> None:
            if level >= least:
                found.append(f"{logging.getLevelName(level)} {text % values}")

        with mock.patch.object(chat, "log_later", log_later):
            yield found
        self.assertTrue(found, "nothing was logged")

    def limit(self, **limits: float) -> None:
        """Sets limits for those who come from now on."""
        self.server.hub.limits = dataclasses.replace(self.server.hub.limits, **limits)

    def exempt(self, networks: str) -> None:
        """Says from where those who come may do what they like."""
        self.server.hub.access = chat.AccessControl(networks)

    def narrow(self) -> None:
        """Gives those who come from now on little room in their sockets for what they leave unread."""
        for sock in self.server.listener.sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, NARROW)

    def connections(self) -> int:
        """How many there are, also of those who are to be told something before they are closed."""
        return len(self.server.mailer)

    def counts(self, asker: Peer | None = None) -> tuple[int, int, int]:
        """How many hold a name, how many connections have none, and how many channels there are.

        Somebody is asked who does not count, or `asker`, who does.
        """
        if not asker and not self.watcher:
            self.watcher = self.peer("NICK watcher\r\nUSER w 0 * :w\r\n")
            self.watcher.until(" 376 ")
        who = asker or self.watcher
        assert who
        who.send("LUSERS\r\n")
        told = "\n".join(who.sync())
        found = re.findall(r" 25[134] \S+ (?::There are )?(\d+)", told)
        self.assertEqual(len(found), 3, told)
        return int(found[0]) - (not asker), int(found[1]), int(found[2])

    def is_here(self, name: str, asker: Peer) -> bool:
        """Whether somebody has a name, also if the connection is lost."""
        asker.send(f"ISON {name}\r\n")
        asker.until(" 303 ")
        return asker.seen[-1].endswith(f" :{name}")

    def peer(self, data: str = "") -> Peer:
        peer = Peer(self.port, data)
        self.addCleanup(peer.close)
        return peer

    def peer_from(self, address: str, port: int, data: str = "") -> Peer:
        """One that connects from an address of its own."""
        peer = Peer(port, data, socket.create_connection(("127.0.0.1", port), PATIENCE, (address, 0)))
        self.addCleanup(peer.close)
        return peer

    def plain(self, name: str) -> Peer:
        peer = self.peer(f"{name}\n")
        peer.until(f"*** {name} joined")
        return peer

    def irc(self, name: str, *caps: str, token: str = "") -> Peer:
        """A client in #chat, which can come back if it has a token."""
        wanted = [*caps, chat.RESUME_CAP] if token else caps
        ask = f"CAP REQ :{' '.join(wanted)}\r\n" if wanted else ""
        ask += f"RESUME {token}\r\n" if token else ""
        peer = self.peer(f"{ask}NICK {name}\r\nUSER {name} 0 * :{name}\r\nCAP END\r\nJOIN #chat\r\n")
        peer.until(" 366 ")
        return peer

    def two(self, *caps: str) -> tuple[Peer, Peer]:
        """Clients ann and bob in #chat, who have read all that they were sent."""
        ann, bob = self.irc("ann", *caps), self.irc("bob", *caps)
        ann.sync()
        return ann, bob

    def told(self, peer: Peer, *lines: str) -> None:
        """Compares the next lines that somebody gets."""
        self.assertEqual([peer.line() for _ in lines], list(lines))

    def write(self, peer: Peer, count: int) -> None:
        for number in range(count):
            peer.send(f"PRIVMSG #chat :{'x' * 200} {number}\r\n")

    def read_slowly(self, connect: Callable[[str], Peer]) -> None:
        """Somebody who connects as told, and does not read at once, gets everything in order."""
        ann = self.plain("ann")
        self.narrow()
        slow = connect("slow\n")
        slow.until("slow joined")
        ann.send("".join(f"{number} {'x' * 400}\n" for number in range(1500)) + "/who\n")
        ann.until("In #chat")
        self.assertLess(slow.unread(), 1500 * 400 - 2 * NARROW, "the server owes nothing")
        self.assertEqual([slow.line() for _ in range(1500)], [f"ann: {number} {'x' * 400}" for number in range(1500)])
        slow.send("/who\n")
        self.told(slow, "*** In #chat: @ann slow")

    def talk_at_once(self, connect: Callable[[str], Peer], count: int) -> None:
        """Eight who connect as told see the same order of what they say, in which that of each is kept."""
        hello = "CAP REQ :echo-message\r\nNICK u{0}\r\nUSER u 0 * :u\r\nCAP END\r\nJOIN #chat\r\n"
        peers = [connect(hello.format(number)) for number in range(8)]
        for peer in peers:
            peer.until(" 366 ")
        with at_once(*(functools.partial(self.write, peer, count) for peer in peers)):
            told = [[peer.until("PRIVMSG") for _ in range(8 * count)] for peer in peers]
        self.assertTrue(all(order == told[0] for order in told))
        for number in range(8):
            said = [line.rpartition(" ")[2] for line in told[0] if line.startswith(f":u{number}!")]
            self.assertEqual(said, [str(n) for n in range(count)])

    def answers(self, peer: Peer, rows: list[tuple[str, list[str]]]) -> None:
        """Sends lines of IRC, and compares what is answered with what must be in it."""
        for line, replies in rows:
            with self.subTest(line):
                peer.send(f"{line}\r\n")
                got = peer.sync()
                self.assertEqual(len(got), len(replies), got)
                for reply, wanted in zip(got, replies):
                    self.assertIn(wanted, reply)


class PlainPeople(ServerCase):
    def test_two_people_talk(self) -> None:
        ann, bob = self.plain("ann"), self.plain("bob")
        bob.send("hello everybody\n/me waves\n/msg ann psst\n/nick rob\n/topic tea\n/quit gone home\nnot said\n")
        self.told(
            ann, "*** bob joined (2 here)", "bob: hello everybody", "* bob waves", "[private] bob: psst",
            "*** bob is now rob", "*** rob set the topic: tea", "*** rob left: gone home",
        )  # fmt: skip
        self.assertEqual(bob.rest(), ["*** bob is now rob", "*** rob set the topic: tea", "*** Goodbye"])

    def test_one_line_joins_one_channel(self) -> None:
        ann, bob = self.plain("ann"), self.plain("bob")
        script = self.peer('{"type":"join","user":"joe"}\n')
        script.until('"joe"')
        bob.send("/join #a,#chat,#b\n/msg *,#chat,#Chat,ANN,ann hello\n")
        self.assertEqual(bob.until("Error"), "*** Error: that is too many names in one command")
        script.send('{"type":"join","channel":"#a,#chat,#b"}\n{"type":"chat","text":"here"}\n')
        self.assertIn("too-many-targets", script.until('"error"'))
        ann.until("joe joined")
        told = [ann.line() for _ in range(3)]
        self.assertEqual([line for line in told if line != "joe: here"], ["bob: hello", "[private] bob: hello"])
        self.assertIn("joe: here", told)
        bob.send("/join #A,#a\n")  # one, spelt twice
        bob.until("*** bob joined")
        self.assertEqual(ann.until("bob left"), "*** bob left: went to #A")

    def test_help_who_join(self) -> None:
        ann, bob = self.plain("ann"), self.plain("bob")
        bob.send("/msg bob\n/who\n/help\n")
        self.told(
            bob,
            "*** Error: it is /msg NAME TEXT",
            "*** In #chat: @ann bob",
            "*** /help [COMMAND]   shows this, or more",
        )
        bob.until("/quit")
        bob.send("/join #tea\nanyone?\n/join nothing\n")
        self.told(bob, "*** bob left: went to #tea", "*** bob joined (1 here)")
        self.assertRegex(bob.line() or "", r"^\*\*\* Error: a channel is #")
        ann.until("*** bob left: went to #tea")
        bob.send("/away tea time\n")
        bob.until("away")
        ann.send("/who\n/names #tea\n/list\n/help mode\n/help /dance\n/part\n")
        self.told(ann, "*** In #chat: @ann", "*** In #tea: @bob (away)", "*** #chat: 1 here. ", "*** #tea: 1 here. ")
        self.told(
            ann, "*** /mode [MODES]     shows or sets modes: +o NAME", *(f"*** {line}" for line in chat.MODE_HELP)
        )
        self.told(ann, "*** /dance is not a command; /help lists them", "*** ann left")
        ann.send("/exit\n")
        self.assertEqual(ann.rest()[-1], "*** Goodbye")

    def test_a_program_that_was_prompted_gets_whole_lines(self) -> None:
        with mock.patch.object(chat, "PROMPT_S", 0.1):
            for first, end, answer in (
                ("eve\n", [], "*** eve joined (1 here)"),
                ("NICK ann\r\nUSER ann 0 * :Ann\r\n", [""], ":chat.local 001 ann :"),
                ('{"type":"join","user":"jon"}\n', [""], '{"type": "system", "event": "join"'),
            ):
                slow = self.peer()
                self.assertEqual(slow.sock.recv(100), b"Enter your name: ")
                slow.send(first)
                self.told(slow, *end)  # of the prompt's line
                self.assertTrue((slow.line() or "").startswith(answer))

    def test_wrong_names_are_refused_and_asked_again(self) -> None:
        self.plain("bob")
        late = self.peer("BOB\nan n\n\x1b[31m\nbоb\nann\nhello\n")
        self.assertEqual(late.line(), "*** Error: that name is taken; choose another")
        for _ in range(3):
            self.assertRegex(late.line() or "", r"^\*\*\* Error: a name is a letter, .*; choose another$")
        self.assertEqual(late.line(), "*** ann joined (2 here)")

    def test_a_user_cannot_look_like_the_system_or_another(self) -> None:
        ann, bob = self.plain("ann"), self.plain("bob")
        ann.line()
        bob.send("*** ann left\n//me dies\n/me : hello\n")
        self.told(ann, "bob: *** ann left", "bob: /me dies", "* bob : hello")

    def test_half_close_after_an_unended_last_line(self) -> None:
        ann, bob = self.plain("ann"), self.plain("bob")
        bob.send("first\nlast")
        bob.sock.shutdown(socket.SHUT_WR)
        ann.until("bob joined")
        self.told(ann, "bob: first", "bob: last", "*** bob left")
        self.assertEqual(bob.rest(), [])

    def test_everything_in_one_packet_or_byte_by_byte(self) -> None:
        ann = self.plain("ann")
        for size in (1, 1000):
            bob = self.peer()
            data = "bob\r\nz\u00fcr\u00edch\n\n\nzwei\nexit\n".encode()
            for start in range(0, len(data), size):
                bob.sock.sendall(data[start : start + size])
            ann.until("bob joined")
            self.told(ann, "bob: z\u00fcr\u00edch", "bob: zwei", "*** bob left")

    def test_telnet_is_answered_and_never_silenced(self) -> None:
        ann, bob = self.plain("ann"), self.peer()
        bob.sock.sendall(b"\xff\xfd\x03\xff\xfb\x18")  # DO SUPPRESS-GO-AHEAD, WILL TERMINAL-TYPE
        self.assertEqual(bob.take(b"\x18"), b"\xff\xfc\x03\xff\xfe\x18")
        for byte in b"bob\r\0hello\r\0\xff\xf4\xff\xfd\x06":  # character mode; then Ctrl-C
            bob.sock.sendall(bytes([byte]))
        ann.until("bob: hello")
        self.assertEqual(bob.take(b"\x06"), b"*** bob joined (2 here)\r\n\xff\xfc\x06")
        bob.sock.sendall(b"\xff\xf6")
        self.assertEqual(bob.line(), "*** Yes, the chat is here")
        ann.send("still there?\n")
        self.assertEqual(bob.line(), "ann: still there?")

    def test_telnet_that_introduces_itself_is_still_prompted(self) -> None:
        with mock.patch.object(chat, "PROMPT_S", 0.1):
            for start in (b"\xff\xfd\x03", b"\xff", b"\xff\xfd"):
                quiet = self.peer()
                for byte in start:
                    quiet.sock.sendall(bytes([byte]))
                quiet.take(b"Enter your name: ")

    def test_telnet_bytes_are_for_plain_users_only(self) -> None:
        noise, witness = b"\xff\xfd\x06\xff\xf6", self.plain("witness")
        for first, said in (
            (b"NICK eve\r\nUSER e 0 * :e\r\nJOIN #chat\r\n", b"PRIVMSG #chat :%b\r\n"),
            (b'{"type":"join","user":"eve"}\n', b'{"type":"chat","text":"%b"}\n'),
        ):
            for pieces in ([first + said % noise + said % b"well"], [first, said % noise, said % b"well"]):
                with self.subTest(pieces):
                    eve = self.peer()
                    for piece in pieces:
                        eve.sock.sendall(piece)
                    witness.until("eve joined")
                    self.assertEqual(witness.line(), "eve: well")
                    eve.sock.shutdown(socket.SHUT_WR)
                    text = "\n".join(eve.rest())  # is UTF-8
                    self.assertEqual(text.count("UTF-8 text"), 1)
                    self.assertNotIn("the chat is here", text)
                    witness.until("eve left")

    def test_a_byte_order_mark_before_the_first_line_is_dropped(self) -> None:
        witness = self.plain("witness")
        for data in (
            "bob\nhello\n", "\r\nbob\r\nhello\r\n",
            "NICK bob\r\nUSER b 0 * :b\r\nJOIN #chat\r\nPRIVMSG #chat :hello\r\n",
            '{"type":"join","user":"bob"}\n{"type":"chat","text":"hello"}\n',
        ):  # fmt: skip
            for size in (1, 1000):
                with self.subTest(data, size=size):
                    whole, bob = b"\xef\xbb\xbf" + data.encode(), self.peer()
                    for start in range(0, len(whole), size):
                        bob.sock.sendall(whole[start : start + size])
                    self.assertIn("bob joined", witness.line() or "")
                    self.assertEqual(witness.line(), "bob: hello")
                    bob.sock.shutdown(socket.SHUT_WR)
                    self.assertEqual(witness.line(), "*** bob left")
        self.assertEqual(self.peer("\ufeffGET / HTTP/1.0\r\n\r\n").line(), "HTTP/1.1 200 OK")
        witness.send("\ufeffmarked\n")  # later it is text
        bob = self.irc("bob")
        witness.send("\ufeffmarked\n")
        self.assertIn(":\ufeffmarked", bob.until("marked"))

    def test_http_and_tls_on_this_port(self) -> None:
        browser = self.peer("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertEqual(browser.line(), "HTTP/1.1 200 OK")
        self.assertEqual(browser.rest()[-1], "</html>")
        hello = self.peer()
        with self.logs(logging.WARNING) as logged:
            hello.sock.sendall(b"\x16\x03\x01\x02\x00\x01")
            self.assertEqual(hello.rest(), [])
        self.assertIn("TLS", logged[0])


class JsonScripts(ServerCase):
    def script(self, *items: dict[str, Any]) -> Peer:
        return self.peer("".join(json.dumps(item) + "\n" for item in items))

    def next(self, peer: Peer) -> dict[str, Any]:
        item = json.loads(peer.line() or "null")
        self.assertIsInstance(item, dict)
        item.pop("time", None)
        item.pop("id", None)
        return dict(item)

    def test_a_script_talks(self) -> None:
        ann = self.plain("ann")
        bot = self.script(
            {"type": "join", "user": "bot"}, {"type": "chat", "text": "h\u00ed", "ref": "r1"},
            {"type": "private", "to": "ann", "text": "psst"}, {"type": "command", "text": "/who"},
            {"type": "private", "to": "nobody", "text": "psst", "ref": "r2"}, {"type": "dance"},
            {"type": "command", "text": "/foo", "ref": "1"}, {"type": "foo", "ref": "2"},
            {"type": "join", "channel": "0", "ref": "3"}, {"type": "chat", "text": "still here", "ref": "4"},
            {"type": "leave"},
        )  # fmt: skip
        told = [self.next(bot) for _ in range(10)]
        self.assertEqual(told[:5], [
            {"type": "system", "event": "join", "user": "bot", "text": "*** bot joined (2 here)", "channel": "#chat"},
            {"type": "ack", "ref": "r1"},
            {"type": "system", "event": "names", "text": "*** In #chat: @ann bot", "users": ["ann", "bot"],
             "ranks": ["@", ""], "channel": "#chat"},
            {"type": "error", "code": "no-such-user", "text": "nobody here is called nobody", "ref": "r2"},
            {"type": "error", "code": "unknown-type", "text": chat.FAIL_BAD_TYPE.text},
        ])  # fmt: skip
        refs = [(item["type"], item.get("ref")) for item in told[5:9]]
        self.assertEqual(refs, [("error", "1"), ("error", "2"), ("error", "3"), ("ack", "4")])
        self.assertEqual(told[9], {"type": "system", "event": "closing", "text": "*** Goodbye"})
        said = ["*** bot joined (2 here)", "bot: h\u00ed", "[private] bot: psst", "bot: still here", "*** bot left"]
        self.told(ann, *said)

    def test_who_is_away_is_told_with_the_names(self) -> None:
        ann, bob = self.plain("ann"), self.plain("bob")
        ann.send("/away lunch\n")
        ann.until("marked as away")
        bot = self.script({"type": "join", "user": "bot"}, {"type": "command", "text": "/who"}, {"type": "ping"})
        told = list(iter(lambda: self.next(bot), {"type": "pong"}))
        away = {"type": "system", "event": "away", "user": "ann", "text": "*** ann is away: lunch"}
        self.assertEqual((told[1]["event"], told[2:]), ("names", [away]))
        bob.send("/who\n/who\n")
        self.told(bob, "*** bot joined (3 here)", *["*** In #chat: @ann (away) bob bot"] * 2)

    def test_names_are_chosen_and_errors_told(self) -> None:
        self.assertRegex(self.next(self.script({"type": "join"}))["user"], r"^guest\d+$")
        wrong = self.script({"type": "chat", "text": "hi"}, {"type": "join", "user": "1"})
        self.assertEqual([self.next(wrong)["code"] for _ in range(2)], ["not-joined", "bad-name"])
        late = self.script({"type": "join", "user": "late"}, {"type": "join", "user": "1", "channel": "#tea"})
        self.assertEqual([self.next(late).get("code") for _ in range(2)], [None, "bad-name"])

    def test_what_is_private_is_never_said_in_public(self) -> None:
        ann, bot = self.plain("ann"), self.peer('{"type":"join","user":"bot"}\n')
        ann.until("bot joined")
        for to in ("*", "#chat", "ann,#chat", "#chat,ann", "ann,ann", "ann #chat"):
            bot.send(json.dumps({"type": "private", "to": to, "text": "psst"}) + "\n")
            self.assertEqual(json.loads(bot.until("error"))["code"], "no-such-user")
        bot.send('{"type":"leave"}\n')
        self.assertEqual(ann.line(), "*** bot left")
        self.assertNotIn("psst", "".join(ann.seen))

    def test_bad_lines_get_one_error_each(self) -> None:
        bot = self.script({"type": "join", "user": "bot"})
        self.next(bot)
        for line, code in ((b"{", "bad-json"), (b"{}", "unknown-type"), (b'{"\xff"}', "invalid-utf8"),
                           (b"[" * 4000, "bad-json"), (b"{" + b"x" * 9000, "too-long")):  # fmt: skip
            bot.sock.sendall(line + b"\n")
            self.assertEqual(self.next(bot)["code"], code)


class Browsers(ServerCase):
    def web(self, name: str = "", *headers: str, **more: Any) -> WebPeer:
        """A WebSocket, of somebody who has joined by JSON if there is a name."""
        peer = WebPeer(self.port, *headers)
        self.addCleanup(peer.close)
        if name:
            peer.say({"type": "join", "user": name, **more})
            peer.json("join")
        return peer

    def test_everybody_talks_in_one_room(self) -> None:
        ann, bob, cid = self.plain("ann"), self.irc("bob"), self.web("cid")
        dan = self.web("", "Sec-WebSocket-Protocol: foo, text.ircv3.net")
        self.assertIn("Sec-WebSocket-Protocol: text.ircv3.net", dan.head)
        for line in ("NICK dan\r\n", "USER d 0 * :d", "JOIN #chat"):
            dan.say(line)
        dan.until(" 366 ")
        self.assertIn("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", cid.head)  # RFC 6455, section 1.3
        cid.say('{"type":"chat",', first=0)
        cid.say("?", chat.WS_PING)
        cid.say('\n"text":"h\u00ed"}', chat.WS_MORE)
        ann.until("cid: h\u00ed")
        bob.until("PRIVMSG #chat :h\u00ed")
        self.assertRegex(dan.until("PRIVMSG"), "^:cid!json@localhost PRIVMSG #chat :h\u00ed$")
        dan.say("PRIVMSG #chat :ho")
        self.assertEqual(cid.json("chat")["text"], "ho")
        self.assertEqual(cid.pongs, [b"?"])
        cid.say(b"\x03\xe8bye", chat.WS_CLOSE)
        self.assertIsNone(cid.line())
        self.assertEqual(cid.code, 1000)
        ann.until("*** cid left")
        self.server.stop()
        self.assertEqual((dan.rest()[-1], dan.code), ("ERROR :Server is shutting down", 1001))

    def test_what_ends_a_connection_is_told_even_amid_a_flood(self) -> None:
        big = b"x" * (chat.CLIENT_INPUT_BYTES + 1)
        for frames, code in (
            (masked(b"", 3), 1002), (masked(b"x", chat.WS_TEXT, 0xC0), 1002), (chat.frame(chat.WS_TEXT, b"{}"), 1002),
            (masked(b"x" * 126, chat.WS_PING), 1002), (masked(b"", chat.WS_PING, 0), 1002),
            (masked(b"", chat.WS_MORE), 1002), (masked(b"", chat.WS_TEXT, 0) * 2, 1002),
            (masked(b"\xff", chat.WS_TEXT), 1007),
            (masked(b"\xc3", chat.WS_TEXT, 0) + masked(b"\xa9", chat.WS_MORE), 0),
            (masked(big, chat.WS_TEXT)[:14], 1009),
            (masked(big[:3000], chat.WS_TEXT, 0) + masked(big[:3000], chat.WS_MORE)[:8], 1009),
            (masked(b"\x03", chat.WS_CLOSE), 1002), (masked(b"\x03\xed", chat.WS_CLOSE), 1002),
            (masked(b"\x03\xe8\xff", chat.WS_CLOSE), 1007), (masked(b"\x03\xe9", chat.WS_CLOSE), 1001),
            (masked(b'{"type":"leave"}', chat.WS_TEXT), 1000),
        ):  # fmt: skip
            with self.subTest(frames[:20]):
                peer = self.web()
                peer.sock.sendall(frames + masked(b"x" * 125, chat.WS_PING) * 1000 * (code > 0))
                if not code:
                    peer.say("", chat.WS_CLOSE)
                peer.sock.shutdown(socket.SHUT_WR)
                self.eventually(lambda: not self.connections(), "it stays")  # with a reset if not all was read
                while peer.line() is not None:
                    pass
                self.assertEqual(peer.code, code)

    def test_frames_without_end_after_the_end_are_not_read_at_full_speed(self) -> None:
        ann, sent = self.web(), 0
        ann.sock.sendall(masked(b"", 3))
        with self.assertRaises(OSError):
            while True:
                sent += ann.sock.send(masked(b"x" * 125, chat.WS_PONG) * 1000)
        self.assertLess(sent, 100 << 20)  # buffers included; without a pause, three times as much

    def test_frames_that_come_with_the_request(self) -> None:
        bob, ann = self.plain("bob"), self.peer()
        frames = masked(b'{"type":"join","user":"ann"}', chat.WS_TEXT) + masked(
            b'{"type":"chat","text":"hi"}', chat.WS_TEXT
        )
        ann.sock.sendall(WebRequests.UPGRADE.format("/", "").encode() + frames)
        bob.until("ann: hi")

    def test_who_is_gone_is_found_out(self) -> None:
        with mock.patch.object(chat, "WEB_PING_S", 0.1):
            ann, hub = self.web("ann"), self.server.hub
            with hub:
                hub.set_deadline(next(iter(hub.sessions)), 0.0)  # not only when the time to register is over
            for _ in range(2):
                self.assertEqual(ann.frame(), (chat.WS_PING, b""))
                ann.say("", chat.WS_PONG)
            self.limit(pong_s=0.1)
            while ann.line() is not None:
                pass
        self.assertEqual(ann.code, 1001)

    def test_json_can_come_back(self) -> None:
        ann, token = self.web("ann", replay=False), "t" * 16
        ann.say({"type": "chat", "text": "0", "ref": "z"})
        ann.json("ack")
        cid = self.web("cid", token=token, replay=False, ref="0")
        cid.say({"type": "chat", "text": "1", "ref": "a"})
        first = cid.json("ack")["id"]
        cid.say(b"\x03\xe9", chat.WS_CLOSE)
        self.assertIsNone(cid.line())
        ann.say({"type": "chat", "text": "2", "ref": "b"})
        ann.json("ack")
        cid = self.web("cid", token=token, replay=False)
        cid.say({"type": "chat", "text": "1", "ref": "a"})  # again
        self.assertEqual(cid.json("ack")["id"], first)
        cid.say({"type": "history", "channel": "#chat", "after": first, "ref": "h"})
        cid.json("ack")
        self.assertEqual([json.loads(line)["text"] for line in cid.seen if '"replayed"' in line], ["2"])
        for more, wanted in (
            ({"before": first}, ["0"]),
            ({}, ["0", "1", "2"]),
            ({"after": "x"}, []),
            ({"before": 1}, []),
        ):
            cid.seen.clear()
            cid.say({"type": "history", "channel": "#chat", **more})
            cid.say({"type": "ping"})
            cid.json("pong")
            self.assertEqual([json.loads(line)["text"] for line in cid.seen if '"replayed"' in line], wanted)
            self.assertEqual(len([line for line in cid.seen if '"error"' in line]), not wanted)
        cid.say({"type": "ping"})
        cid.json("pong")
        short = self.web()
        short.say({"type": "join", "user": "dan", "token": "x" * 15})
        self.assertIn("16 to 64", short.json("error")["text"])
        again = self.web("cid", token=token)
        self.assertIsNone(cid.line() and cid.line())
        self.assertEqual(cid.code, 4001)
        again.say({"type": "command", "text": "/who"})
        self.assertEqual(again.json("names")["ranks"], ["@", ""])
        self.assertFalse([line for line in ann.seen if "left" in line])

    def test_what_was_said_is_known_although_the_name_is_taken_now(self) -> None:
        psst = {"type": "private", "to": "bob", "text": "psst", "ref": "1"}
        bob, ann = self.web("bob"), self.web("ann", token="t" * 16)
        ann.say(psst)
        first = ann.json("ack")["id"]
        ann.say({"type": "leave"})
        ann.rest()
        self.web("ann")
        ann = self.web()
        for name in ("ann", "ann2"):
            ann.say({"type": "join", "user": name, "token": "t" * 16})
        ann.json("join")
        ann.say(psst)  # again
        self.assertEqual(ann.json("ack")["id"], first)
        bob.say({"type": "ping"})
        bob.json("pong")
        self.assertEqual(len([line for line in bob.seen if "psst" in line]), 1)


class WebRequests(ServerCase):
    GET = "GET / HTTP/1.1\r\nHost: localhost\r\n"
    POST = "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n{}\r\n{}"
    UPGRADE = (
        "GET {} HTTP/1.1\r\nHost: localhost\r\nUpgrade: x, WebSocket\r\nConnection: keep-alive, upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{}\r\n"
    )
    # What is sent, the status, and what is in the answer.
    REQUESTS = [
        (f"{GET}\r\n", 200, "\nContent-Type: text/html; charset=utf-8\n"),
        (f"{GET}\r\n".replace("\r", ""), 200, "</html>"),
        ("GET /any/path/?x HTTP/1.0\r\n\r\n", 200, "\nConnection: close\n"),
        (f"{GET}Content-Length: 5\r\n\r\nhello", 200, "</html>"), (f"{GET}Accept: \xe4\r\n\r\n", 200, "</html>"),
        ("GET http://localhost HTTP/1.1\r\nHost: evil.example\r\n\r\n", 200, "ws://localhost wss://localhost"),
        ("GET /x/chat.py HTTP/1.0\r\n\r\n", 200, "class Mailer"), ("GET /health HTTP/1.0\r\n\r\n", 200, "\n\nok\n"),
        ("GET /metrics HTTP/1.0\r\n\r\n", 200, "\n# TYPE chat_messages counter\nchat_messages_total 0\n"),
        ("GET /favicon.ico HTTP/1.0\r\n\r\n", 404, ""), ("OPTIONS /health HTTP/1.0\n\n", 405, "\nAllow: GET, HEAD\n"),
        ("PUT / HTTP/1.0\n\n", 405, "\nAllow: GET, HEAD, POST\n"), ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, ""),
        *((request, 400, "") for request in (
            "GET  / HTTP/1.1\r\nHost: a\r\n\r\n", "GET / x HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
            "GET x HTTP/1.1\r\nHost: a\r\n\r\n", "GET /\xe4 HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\n\r\n", f"{GET}Host: localhost\r\n\r\n", "GET / HTTP/1.1\r\nHost:\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", "GET / HTTP/1.1\r\nHost: a'\r\n\r\n",
            "GET / HTTP/1.0\r\nHost: [::1\r\n\r\n",
            f"{GET} folded\r\n\r\n", f"{GET}Name : x\r\n\r\n", f"{GET}Name\r\n\r\n", f"{GET}: x\r\n\r\n",
            f"{GET}N: a\rb\r\n\r\n",
            f"{GET}N: a\0\r\n\r\n", f"{GET}N: \x1b\r\n\r\n",
            f"{GET}Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n",
            POST.format("/", 1, "Content-Length: 1\r\n", "x"), POST.format("/", "+1", "", "x"), POST.format("/",
            "1, 1", "", "x"),
            POST.format("/", 2, "Authorization: Basic x\r\n", "x\n"), POST.format("/?name=1", 2, "", "x\n"),
        )),
        ("POST / HTTP/1.1\r\nHost: a\r\n\r\n", 411, ""), (POST.format("/", chat.HTTP_BYTES + 1, "", ""), 413, ""),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 411, ""),
        (GET + "N: x\r\n" * (chat.HTTP_BYTES // 6), 431, ""),
        *((f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n", 421, "--web-origin") for host in ("evil.example",
        "1.2.3.4.nip.io.:80")),
        *((f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n", 200, f"ws://{host} ") for host in (
            "printer", "a.local:80", "A.Localhost", "x.lan.", "a.internal", "a.home.arpa", "192.168.1.2:9",
            "[fe80::1]:9",
            "chat.example.org",
        )),
        (f"{GET}Origin: http://localhost\r\n\r\n", 200, ""),
        (f"{GET}Origin: https://chat.example.org\r\n\r\n", 200, ""),
        (f"{GET}Origin: http://localhost:80\r\n\r\n", 403, ""), (f"{GET}Origin: null\r\n\r\n", 403, ""),
        (f"{GET}Origin: http://evil.example\r\n\r\n", 403, ""),
        (f"{GET}Upgrade: h2c\r\nConnection: Upgrade\r\n\r\n", 200, ""),
        (UPGRADE.format("/", "").replace("GET", "POST"), 411, ""),
        (UPGRADE.format("/", "").replace("GET", "HEAD"), 400, ""),
        (UPGRADE.format("/", "").replace("HTTP/1.1", "HTTP/1.0"), 400, ""), (UPGRADE.format("/x", ""), 404, ""),
        (UPGRADE.format("/", "").replace("upgrade", "x"), 400, ""),
        (UPGRADE.format("/", "").replace("Z", "!"), 400, ""),
        (UPGRADE.format("/", "").replace("dGhl", ""), 400, ""), (UPGRADE.format("/", "Origin: http://a\r\n"), 403, ""),
        (UPGRADE.format("/", "").replace(": 13", ": 8"), 426, "\nSec-WebSocket-Version: 13\n"),
    ]  # fmt: skip

    def ask(self, request: str) -> tuple[int, str]:
        """The status of an answer, and all of it."""
        peer = self.peer()
        peer.sock.sendall(request.encode("latin-1"))
        answer = "\n".join(peer.rest()) + "\n"
        return int(answer[9:12] or 0), answer

    def test_every_request_gets_its_status(self) -> None:
        self.server.web_origins = ["https://chat.example.org"]
        ann = self.plain("ann")
        for request, status, part in self.REQUESTS:
            with self.subTest(request[:200]):
                found, answer = self.ask(request)
                self.assertEqual(found, status, answer[:200])
                self.assertIn(part, answer)
                head, _, body = answer.partition("\n\n")
                if not request.startswith("HEAD"):
                    self.assertIn(f"Content-Length: {len(body.encode())}", head)
                self.assertIn("X-Content-Type-Options: nosniff\n", head)
        for request, status, _ in self.REQUESTS[:3]:
            found, answer = self.ask(request.replace("GET", "HEAD"))
            self.assertEqual((found, answer.partition("\n\n")[2]), (status, ""))
        ann.send("/who\n")
        self.told(ann, "*** In #chat: @ann")  # nothing else of all that was heard

    def test_somebody_elses_page_cannot_pass_for_a_person(self) -> None:
        """Whatever it lets a browser send as the first line, the next ones are not what people type."""
        ann = self.plain("ann")
        for line in (f"POST /{'x' * chat.CLIENT_INPUT_BYTES}", "NICK /", "q-q /"):
            eve = self.peer(
                f"{line} HTTP/1.1\r\nHost: a.example\r\n\r\neve\r\nNICK eve\r\nUSER e 0 * :e\r\nJOIN #chat\r\n"
            )
            eve.sock.shutdown(socket.SHUT_WR)
            eve.rest()
        ann.send("/who\n")
        self.told(ann, "*** In #chat: @ann")

    def test_post_says_lines_once_and_is_told_their_ids(self) -> None:
        ann = self.plain("ann")
        status, answer = self.ask(self.POST.format("/?name=ci", 25, "", "build 42\r\n\r\n/me is gr\xc3\xbcn\n"))
        ids = answer.partition("\n\n")[2].split()
        self.told(ann, "ci: build 42", "ci: /me is gr\u00fcn")  # nobody is shown to come and go
        self.assertEqual((status, len(ids)), (200, 2))
        for _ in range(2):
            key = "Idempotency-Key: 1\r\n"
            answers = [self.ask(self.POST.format("/?name=ci&channel=%23ops", 4, key, "a\nb\n")) for _ in range(2)]
            self.assertEqual(answers[0][1][-27:], answers[1][1][-27:])
        bob = self.plain("bob")
        bob.until("End of what")
        bob.seen.clear()
        self.assertEqual(self.ask(self.POST.format("/?name=ci&channel=ops", 1, "", "c"))[0], 200)
        bob.send("/join #ops\n")
        bob.until("End of what")
        self.assertEqual([line for line in bob.seen if line.startswith("ci")], ["ci: a", "ci: b", "ci: c"])
        for path, body, status, part in (
            ("/?name=ann", "x", 409, "taken"), ("/?name=ci", "\xff", 400, "UTF-8"), ("/?name=ci", "\n", 400, "no text"),
            ("/?channel=%07", "x", 400, "a channel is #"), ("/?name=ci", "x" * 500, 400, "too long"),
            ("/x", "x", 404, ""),
        ):  # fmt: skip
            with self.subTest(path, body=body):
                found, answer = self.ask(self.POST.format(path, len(body), "", body))
                self.assertEqual(found, status, answer)
                self.assertIn(part, answer)

    def test_whoever_guesses_an_idempotency_key_is_not_who_posted(self) -> None:
        answer = self.ask(self.POST.format("/?name=ci", 5, "Idempotency-Key: 1\r\n", "green"))[1]
        eve = WebPeer(self.port)
        self.addCleanup(eve.close)
        eve.say({"type": "join", "user": "ci", "token": hashlib.sha256(b"ci 1").hexdigest()})
        eve.say({"type": "chat", "text": "red", "ref": "1"})
        self.assertNotIn(eve.json("ack")["id"], answer)  # else it would be taken for the same line, of the same author

    def test_post_needs_the_password(self) -> None:
        self.server.hub.access = chat.AccessControl(password="s\u00e9cret word")
        basic = base64.b64encode("x:s\u00e9cret word".encode()).decode()
        for header, status in (
            ("", 401), ("Authorization: Bearer wrong\r\n", 401), (f"Authorization: basic {basic}\r\n", 200),
            ("Authorization: Bearer s\xc3\xa9cret word\r\n", 200), ("Authorization: Digest x\r\n", 401),
        ):  # fmt: skip
            found, answer = self.ask(self.POST.format("/", 2, header, "hi"))
            self.assertEqual(found, status, header)
            self.assertEqual("\nWWW-Authenticate: Basic" in answer, status == 401)

    def test_a_request_that_does_not_end(self) -> None:
        self.limit(register_s=0.3)
        requests = "GET / HTTP/1.1\r\n", f"{self.GET}Cookie: ", self.POST.format("/", 2, "", "x")
        for peer in [self.peer(request) for request in requests]:
            self.assertEqual(peer.line(), "HTTP/1.1 408 Request Timeout")
            peer.rest()
        self.limit(register_s=PATIENCE)
        curl = self.peer(self.POST.format("/", 1, "Expect: 100-continue\r\n", ""))
        self.assertEqual(curl.line(), "HTTP/1.1 100 Continue")
        self.server.stop()
        self.assertEqual(curl.rest()[1], "HTTP/1.1 503 Service Unavailable")

    def test_a_browsers_spare_connection_is_not_prompted(self) -> None:
        with mock.patch.object(chat, "PROMPT_S", 0.1):
            self.ask("GET / HTTP/1.0\r\n\r\n")
            spare, typed = self.peer(), self.peer("\n")
            self.assertEqual(typed.take(b": "), b"Enter your name: ")
            person = self.peer_from("127.0.0.2", self.port)
            self.assertEqual(person.take(b": "), b"Enter your name: ")
            spare.send("GET /health HTTP/1.0\r\n\r\n")
            self.assertEqual(spare.line(), "HTTP/1.1 200 OK")
            typed.send("bob\n")
            typed.until("bob joined")
            self.limit(register_s=0.2)
            self.assertEqual(self.peer().rest(), [])
        access = chat.AccessControl()
        for number in [*range(chat.BROWSERS), 0, -1]:
            access.add_browser(chat.Address(str(number)))
        self.assertEqual((len(access.browsers), next(iter(access.browsers))), (chat.BROWSERS, "2"))

    def test_the_address_that_a_proxy_tells(self) -> None:
        self.exempt("127.0.0.1,10.0.0.0/8")
        for source, header, status in (
            ("127.0.0.1", "", 200), ("127.0.0.1", "X-Forwarded-For: 192.0.2.1\r\n", 403),
            ("127.0.0.1", "X-Forwarded-For: 127.0.0.1, 192.0.2.1,10.1.1.1\r\n", 403),
            ("127.0.0.1", "X-Forwarded-For: unknown, 10.1.1.1\r\n", 200), ("127.0.0.1", "X-Forwarded-For: x\r\n", 200),
            ("127.0.0.2", "X-Forwarded-For: 10.1.1.1\r\n", 200),
            ("127.0.0.1", "X-Forwarded-For: 192.0.2.1, 192.0.2.2:80\r\n", 200),  # the first one is anybody's word
        ):  # fmt: skip
            peer = self.peer_from(source, self.port, f"GET /metrics HTTP/1.0\r\n{header}\r\n")
            self.assertIn(f" {status} ", peer.rest()[0], header)
        self.limit(per_address=1)
        with self.server.hub as hub:
            hub.access.banned["192.0.2.2"] = ""
        for address, status in (("192.0.2.3", 101), ("192.0.2.3", 429), ("192.0.2.2", 429), ("192.0.2.4", 101)):
            peer = self.peer(self.UPGRADE.format("/", f"X-Forwarded-For: {address}\r\n"))
            self.assertIn(f" {status} ", peer.line() or "")
        sessions = self.server.hub.sessions
        self.eventually(
            lambda: len({x.host for x in list(sessions)} - {"localhost"}) == len(sessions) == 2, "a proxy's"
        )
        proxy = self.server.hub.access.address("127.0.0.1")
        self.eventually(lambda: not proxy.connections, "they count as the proxy's, too")


class WebSocketEcho(chat.WebSocket):
    """The server's end of a WebSocket that sends back each message, over a socket where the handshake is to come."""

    def __init__(self, sock: socket.socket) -> None:
        first, _, rest = sock.recv(65536).partition(b"\r\n")
        http = chat.Http(first)
        while http.feed(rest) is None:
            rest = sock.recv(65536)
        assert http.request
        sock.sendall(http.request.handshake())
        super().__init__(sock, 32 << 20, self.answer)
        self.sock = sock
        self.echoes: list[bytes] = []

    def answer(self, data: bytes, ends: bool) -> None:
        self.sock.sendall(data)
        if ends:
            self.sock.shutdown(socket.SHUT_WR)

    def line_of(self, opcode: int, message: bytes) -> bytes:
        line = super().line_of(opcode, message)
        self.echoes.append(chat.frame(opcode, message))
        return line

    @classmethod
    def serve(cls, listening: socket.socket) -> None:
        """Serves one after another until the socket is closed."""
        while True:
            try:
                sock = listening.accept()[0]
            except OSError:
                return
            with sock, contextlib.suppress(OSError):
                sock.settimeout(PATIENCE)
                echo, data = cls(sock), b"x"
                while data:
                    with contextlib.suppress(BlockingIOError):
                        data = echo.recv(65536)
                    sock.sendall(b"".join(echo.echoes))
                    echo.echoes.clear()


class Conformance(ServerCase):
    """WebSocket as programs of others understand it."""

    @unittest.skipUnless(importlib.util.find_spec("websockets"), "needs websockets")
    def test_the_websockets_library(self) -> None:
        connect = importlib.import_module("websockets.sync.client").connect
        url, ann = f"ws://127.0.0.1:{self.port}/", self.plain("ann")
        with connect(url) as bot, connect(url, subprotocols=["binary.ircv3.net", "text.ircv3.net"]) as bob:
            self.assertEqual((bot.subprotocol, bob.subprotocol), (None, "binary.ircv3.net"))
            bot.send(json.dumps({"type": "join", "user": "bot"}))
            self.assertEqual(json.loads(bot.recv(PATIENCE))["event"], "join")
            for line in (b"NICK bob", b"USER b 0 * :b", b"JOIN #chat"):
                bob.send(line)
            self.assertEqual(json.loads(bot.recv(PATIENCE))["user"], "bob")
            ann.until("bob joined")
            self.assertTrue(bot.ping(b"x").wait(PATIENCE))
            ann.send("x" * 300 + "\u00e9\n")
            self.assertEqual(json.loads(bot.recv(PATIENCE))["text"], "x" * 300 + "\u00e9")
            while b" PRIVMSG " not in (line := bob.recv(PATIENCE)):
                pass
            self.assertEqual(line, b":ann!plain@localhost PRIVMSG #chat :" + b"x" * 300 + "\u00e9".encode())
            bob.send(b"QUIT :tea")
            self.assertEqual(list(bob), [b"ERROR :Goodbye"])
            self.assertEqual(bob.close_code, 1000)
            ann.until("*** bob left: tea")
        self.assertEqual(bot.close_code, 1000)
        ann.until("*** bot left")

    @unittest.skipUnless(shutil.which("wstest"), "needs the Autobahn test suite")
    def test_autobahn(self) -> None:
        listening, folder = socket.create_server(("127.0.0.1", 0)), temporary_folder(self)
        url, cases = f"ws://127.0.0.1:{listening.getsockname()[1]}", [f"{kind}.*" for kind in (1, 2, 3, 4, 5, 6, 7, 10)]
        spec = {
            "outdir": str(folder),
            "servers": [{"agent": "chat", "url": url}],
            "cases": cases,
            "exclude-cases": ["6.4.*"],
        }
        (folder / "spec.json").write_text(json.dumps({**spec, "options": {}}))
        thread = threading.Thread(target=WebSocketEcho.serve, args=(listening,), daemon=True)
        thread.start()
        command = ["wstest", "--mode", "fuzzingclient", "--spec", str(folder / "spec.json")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            listening.close()
            thread.join(PATIENCE)
        self.assertEqual(done.returncode, 0, done.stdout[-2000:] + done.stderr[-2000:])
        found = json.loads((folder / "index.json").read_text())["chat"]
        self.assertEqual(len(found), 243)
        # Left out: 6.4, as whether text is UTF-8 is judged at its end. The others only tell what is done.
        odd = {name: case for name, case in found.items() if {case["behavior"], case["behaviorClose"]} != {"OK"}}
        self.assertEqual(sorted(odd), ["7.1.6", "7.13.1", "7.13.2"], odd)


class BotLibraries(ServerCase):
    """Libraries with which bots are written: one does what it is told, by somebody with nc."""

    PINGS = 5

    def setUp(self) -> None:
        super().setUp()
        self.limit(ping_s=0.2)
        self.ann = self.plain("ann")
        self.pings = 0

    def command(self, commands: dict[str, Any], text: str) -> Any:
        verb, word = text.split()
        return commands[verb](word)

    def talk(self, run: Callable[[], Any]) -> None:
        """Runs a bot in a thread of its own, and tells it what to do."""
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.ann.until("*** bot joined (2 here)")
        self.ann.send("say tea\n")
        self.ann.until("bot: tea")
        self.ann.until("bot: pinged")
        self.ann.send("be robot\n")
        self.ann.until("*** bot is now robot")
        self.ann.send("say more\n")
        self.ann.until("robot: more")
        self.ann.send("leave tired\n")
        self.ann.until("*** robot left: tired")
        thread.join(PATIENCE)
        self.assertFalse(thread.is_alive())

    def pinged(self) -> bool:
        """Counts a PING; True once there were enough."""
        self.pings += 1
        return self.pings == self.PINGS

    @unittest.skipUnless(importlib.util.find_spec("irc"), "needs the library irc")
    def test_irc(self) -> None:
        reactor = importlib.import_module("irc.client").Reactor()
        bot, gone = reactor.server(), threading.Event()
        say = functools.partial(bot.privmsg, "#chat")
        commands = {"say": say, "be": bot.nick, "leave": bot.quit}
        for event, handler in {
            "welcome": lambda *_: bot.join("#chat"),
            "pubmsg": lambda _, event: self.command(commands, event.arguments[0]),
            "ping": lambda *_: say("pinged") if self.pinged() else None,
            "disconnect": lambda *_: gone.set(),
        }.items():
            bot.add_global_handler(event, handler)

        def run() -> None:
            bot.connect("127.0.0.1", self.port, "bot")
            while not gone.is_set():
                reactor.process_once(0.1)

        self.talk(run)

    @unittest.skipUnless(importlib.util.find_spec("pydle"), "needs the library pydle")
    def test_pydle(self) -> None:
        client = importlib.import_module("pydle").Client
        silent = mock.patch.object(logging, "lastResort", None)  # it complains of our goodbye
        silent.start()
        self.addCleanup(silent.stop)

        async def run() -> None:
            bot, gone = client("bot", realname="bot"), asyncio.Event()
            say, connected, ping = functools.partial(bot.message, "#chat"), bot.on_connect, bot.on_raw_ping
            commands = {"say": say, "be": bot.set_nickname, "leave": bot.quit}

            async def on_connect() -> None:
                await connected()
                await bot.join("#chat")

            async def on_message(_: str, sender: str, text: str) -> None:
                if sender != bot.nickname:
                    await self.command(commands, text)

            async def on_raw_ping(message: Any) -> None:
                await ping(message)
                if self.pinged():
                    await say("pinged")

            async def on_disconnect(_: bool) -> None:
                gone.set()

            bot.on_connect, bot.on_message, bot.on_raw_ping = on_connect, on_message, on_raw_ping
            bot.on_disconnect = on_disconnect
            await bot.connect("127.0.0.1", self.port, tls=False)
            await gone.wait()

        self.talk(lambda: asyncio.run(run()))


class IrcClients(ServerCase):
    def test_registration_as_irssi_does_it(self) -> None:
        peer = self.peer("CAP LS 302\r\nJOIN :\r\n")
        offered = " ".join(name + chat.CAP_VALUES.get(name, "") for name in chat.CAPABILITIES)
        self.assertEqual(peer.line(), f":chat.local CAP * LS :{offered}")
        self.assertIn(" 451 * ", peer.line() or "")
        peer.send("CAP REQ :server-time multi-prefix\r\nNICK ann\r\nUSER ann 0 * :Ann Example\r\n")
        self.assertEqual(peer.line(), ":chat.local CAP * ACK :server-time multi-prefix")
        peer.send("CAP REQ :sasl\r\nCAP LIST\r\nCAP DANCE\r\nCAP END\r\n")
        self.told(
            peer, ":chat.local CAP ann NAK :sasl", ":chat.local CAP ann LIST :cap-notify multi-prefix server-time",
        )  # fmt: skip
        self.assertIn(" 410 ann DANCE ", peer.line() or "")
        codes = [chat.parse(peer.line() or "").command for _ in range(16)]
        self.assertEqual(" ".join(codes), "001 002 003 004 005 005 251 252 253 254 255 265 266 375 372 376")
        tokens = [word for line in peer.seen if " 005 " in line for word in line.split(" :")[0].split()[3:]]
        for token in (
            "CASEMAPPING=ascii",
            "PREFIX=(ov)@+",
            "CHANMODES=beI,k,l,Cimnst",
            "NICKLEN=24",
            "UTF8ONLY",
            "WHOX",
        ):
            self.assertIn(token, tokens)

    HELP_LINES = len(chat.split_text(" ".join(chat.COMMANDS), 80))
    REPLIES = [
        ("PING x", [":chat.local PONG chat.local :x"]), ("MODE #chat", ["324 ann #chat :+n", "329 ann #chat "]),
        ("MODE #chat b", ["368 ann #chat :"]), ("MODE #chat +o ann", ["482 ann #chat :"]), ("MODE ann", ["221 ann :+"]),
        ("MODE bob", ["502 "]),
        ("WHO #chat", ["352 ann #chat bob localhost chat.local bob G@ :0 bob", "352 ann #chat ann ", "315 ann #chat "]),
        ("WHO #tea %tcuhnfr,743", ["354 ann 743 #tea bob localhost bob G@ :bob", "315 ann #tea "]),
        ("WHO #chat %n", ["354 ann :bob", "354 ann :ann", "315 "]),
        ("WHOIS bob", [
            "311 ann bob bob localhost * :bob", "319 ann bob :@#chat @#tea", "312 ", "301 ann bob :brb",
            "317 ann bob 0 ", "318 ann bob :",
        ]),
        ("WHOIS nobody", ["401 ann nobody :nobody here is called nobody", "318 ann nobody :"]),
        ("WHOWAS nobody", ["406 ann nobody :", "369 ann nobody :"]),
        ("MODE ann +i", [":ann!ann@localhost MODE ann :+i"]), ("MODE ann +i", []),
        ("MODE ann +oB-i", ["501 ", ":ann!ann@localhost MODE ann :+B-i"]),
        ("MODE ann", ["221 ann :+B"]), ("MODE ann -B+i-i", [":ann!ann@localhost MODE ann :-B"]),
        ("PRIVMSG * :x", ["403 "]), ("GUEST", ["462 "]),
        ("LIST", ["321 ", "322 ann #chat 2 :", "322 ann #tea 1 :Earl Grey", "323 "]),
        ("LIST #tea", ["321 ", "322 ann #tea 1 :Earl Grey", "323 "]),
        ("NAMES #tea", ["353 ann = #tea :@bob", "366 ann #tea :"]), ("NAMES #nix", ["366 ann #nix :"]),
        ("TOPIC #chat", ["331 ann #chat :"]), ("TOPIC #tea", ["442 ann #tea :you are not in #tea"]),
        ("ISON bob nobody ANN", ["303 ann :bob ann"]),
        ("USERHOST bob ann", ["302 ann :bob=-bob@localhost ann=+ann@localhost"]), ("MOTD", ["375 ", "372 ", "376 "]),
        ("LUSERS", [
            "251 ann :There are 2 users and 0 invisible on 1 servers", "252 ann 0 :", "253 ann 0 :", "254 ann 2 :",
            "255 ann :I have 2 clients and 0 servers", "265 ann 2 2 :", "266 ann 2 2 :",
        ]), ("AWAY :gone", ["306 "]),
        ("AWAY", ["305 "]), ("NICK bob", ["433 ann bob :that name is taken; choose another"]),
        ("NICK 5", ["432 ann 5 :"]), ("NICK", ["431 ann :"]), ("USER a b c d", ["462 "]), ("PASS x", ["462 "]),
        ("DANCE", ["421 ann DANCE :DANCE is not a command here"]), ("JOIN", ["461 ann JOIN :"]),
        ("JOIN nothing", ["476 "]), (f"JOIN #{'x' * chat.CHANNEL_CHARS}", [f"403 ann #{'x' * chat.CHANNEL_CHARS} :a "]),
        ("PART #tea", ["442 "]), ("PART #nix", ["403 ann #nix :there is no channel #nix"]),
        ("PRIVMSG", ["411 "]), ("PRIVMSG bob", ["412 "]), ("PRIVMSG #tea :x", ["404 ann #tea :"]),
        ("PRIVMSG nobody,#nix :x", ["401 ", "403 "]), ("PRIVMSG a,b,c,d,e :x", ["407 "]),
        ("PRIVMSG bob :x", ["301 ann bob :brb"]), ("NOTICE nobody :x", []), ("CAP", ["461 "]),
        ("MOTD else.where", ["402 ann else.where :no server here is called else.where"]),
        ("VERSION", ["351 ann chat.py-0.1 chat.local :", "005 ann ", "005 ann "]), ("VERSION x", ["402 ann x :"]),
        ("TIME chat.*", ["391 ann chat.local :20"]), ("INFO", ["371 ann :chat.py", "371 ann :Started 20", "374 ann :"]),
        ("LINKS", ["364 ann chat.local chat.local :0 a small chat", "365 ann * :"]), ("OPER x y", ["491 ann :"]),
        ("KILL bob :x", ["481 ann :"]), ("WALLOPS x", ["481 ann :"]), ("INVITE bob", ["461 ann INVITE :"]),
        ("INVITE bob #chat", ["443 ann bob #chat :"]), ("INVITE bob #nix", ["403 ann #nix :"]),
        ("INVITE nobody #chat", ["401 ann nobody :"]), ("KICK #chat bob", ["482 ann #chat :"]),
        ("KICK #nix bob", ["403 ann #nix :"]), ("NAMES", ["366 ann * :"]), ("NAMES #a,#a,#a", ["366 ann #a :"]),
        ("NAMES #tea,#nix,#chat", ["353 ann = #tea :@bob", "353 ann = #chat :@bob ann", "366 ann #tea,#nix,#chat :"]),
        ("HELP", ["704 ann * :HELP with one of these", *["705 ann * :"] * HELP_LINES, "706 ann * :"]),
        ("HELPOP privmsg", ["704 ann privmsg :PRIVMSG <target>{,<target>} :<text>", "706 ann privmsg :"]),
        ("HELP MODE", ["704 ann MODE :MODE <", *["705 ann MODE :+"] * len(chat.MODE_HELP), "706 ann MODE :"]),
        ("HELP nothing", ["524 ann nothing :there is no help for nothing"]), ("HELPOP :a b", ["524 ann a :"]),
        ("NAMES #a,#b,#c,#d,#e", ["407 ann :"]), ("LIST *a,*b,*c,*d,*e", ["407 ann :"]),
        ("NICK ANN", [":ann!ann@localhost NICK :ANN"]),
    ]  # fmt: skip

    def test_every_command_answers(self) -> None:
        bob = self.irc("bob")
        bob.send("JOIN #tea\r\nTOPIC #tea :Earl Grey\r\nAWAY :brb\r\n")
        bob.sync()
        self.answers(self.irc("ann"), self.REPLIES)

    def test_join_part_topic_nick_quit_as_others_see_them(self) -> None:
        ann, bob = self.two()
        bob.send(
            "TOPIC #chat :tea\r\nNICK rob\r\nPART #chat :bye\r\nJOIN #CHAT\r\nQUIT :gone\r\nPRIVMSG #chat :never\r\n"
        )
        self.told(
            ann, ":bob!bob@localhost TOPIC #chat :tea", ":bob!bob@localhost NICK :rob",
            ":rob!bob@localhost PART #chat :bye", ":rob!bob@localhost JOIN #chat",
            ":rob!bob@localhost QUIT :Quit: gone",
        )  # fmt: skip
        self.assertEqual(ann.sync(), [])
        self.assertEqual(bob.rest()[-1], "ERROR :Goodbye")
        self.assertIn(":chat.local 332 rob #chat :tea", bob.seen)

    def test_a_target_counts_once_however_often_it_is_named(self) -> None:
        ann, bob = self.two("message-tags")
        bob.send("PRIVMSG #chat,#CHAT,ANN,#Chat,ann :hi\r\nNOTICE #chat,#CHAT,Ann,ann,#Chat :hi\r\n")
        bob.send("@+x=1 TAGMSG #chat,#CHAT,#Chat,#cHat,#chAt,#chaT\r\nNAMES #chat,#CHAT\r\nLIST #chat,#CHAT\r\n")
        codes = [chat.parse(line).command for line in bob.sync()]
        self.assertEqual(codes, ["353", "366", "321", "322", "323"])
        heard = [(message.command, message.params[0]) for message in map(chat.parse, ann.sync())]
        wanted = [(command, target) for command in ("PRIVMSG", "NOTICE") for target in ("#chat", "ann")]
        self.assertEqual(heard, [*wanted, ("TAGMSG", "#chat")])
        bob.send("JOIN #tea,#Tea key\r\nPART #tea,#TEA\r\nKICK #chat bob,BOB\r\n")
        codes = [chat.parse(line).command for line in bob.sync()]
        self.assertEqual(codes, ["JOIN", "353", "366", "PART", "482"])

    def test_who_shares_two_channels_sees_a_quit_once(self) -> None:
        ann, bob = self.irc("ann"), self.irc("bob")
        ann.send("JOIN #tea\r\n")
        ann.sync()
        bob.send("JOIN #tea\r\nNICK rob\r\nQUIT\r\n")
        ann.until("rob!bob@localhost QUIT")
        self.assertEqual(len([line for line in ann.seen if " NICK :rob" in line]), 1)
        self.assertEqual(ann.sync(), [])

    def test_echo_tags_and_private_messages(self) -> None:
        ann, bob = self.irc("ann", "echo-message", "message-tags", "server-time"), self.irc("bob")
        ann.sync()
        ann.send("@+x=1;y=2 PRIVMSG #chat :hi\r\n@+x=1 TAGMSG #chat\r\nPRIVMSG bob :psst\r\nPRIVMSG ann :me\r\n")
        lines = ann.sync()
        stamp = r"^@time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z;msgid=[^ :;][^ ;]*"
        self.assertRegex(lines[0], stamp + r";\+x=1 :ann!ann@localhost PRIVMSG #chat :hi$")
        self.assertRegex(lines[1], stamp + r";\+x=1 :ann!ann@localhost TAGMSG #chat$")
        self.assertRegex(lines[2], stamp + r" :ann!ann@localhost PRIVMSG bob :psst$")
        self.assertRegex(lines[3], stamp + r" :ann!ann@localhost PRIVMSG ann :me$")
        self.assertEqual(len(lines), 4)
        self.assertEqual(bob.sync(), [":ann!ann@localhost PRIVMSG #chat :hi", ":ann!ann@localhost PRIVMSG bob :psst"])
        bob.send("PRIVMSG #chat :no echo\r\nPRIVMSG bob :me\r\n")
        self.assertEqual(bob.sync(), [":bob!bob@localhost PRIVMSG bob :me"])

    def test_longest_line_and_one_byte_more(self) -> None:
        ann, bob = self.two()
        room = chat.LINE_BYTES - len(":bob!bob@localhost PRIVMSG #chat :\r\n")
        texts = ["x" * (room - 2) + "\u00e9", "x" * (room - 1) + "\u00e9", "after"]
        bob.send("".join(f"PRIVMSG #chat :{text}\r\n" for text in texts))
        self.assertEqual(len((ann.line() or "").encode()) + 2, chat.LINE_BYTES)
        self.assertEqual(ann.line(), ":bob!bob@localhost PRIVMSG #chat :after")
        self.assertIn(" 417 bob ", bob.line() or "")

    def test_no_answer_is_longer_than_a_line(self) -> None:
        ann = self.irc("ann")
        heads = "|PING |PART #|WHOIS |CAP REQ :|CAP |JOIN #|NICK |NAMES #|WHO |ISON |WHO #chat %t,|PRIVMSG |MODE "
        heads += "|MODE #chat |USERHOST |WHOWAS |MODE #chat +b |KICK #chat |INVITE |VERSION |SETNAME |HELP |LIST !"
        heads += f"|MONITOR + {'y' * 64},{'z,' * 120}|MODE ann +|PRIVMSG @#|NAMES {'#' + 'é' * 99},#,#,#"
        for head in heads.split("|"):
            ann.send(head + "x" * (chat.LINE_BYTES - 2 - len(head)) + "\r\n")
        for line in ann.sync():
            self.assertLessEqual(len(line.encode()) + 2, chat.LINE_BYTES, line)

    def test_no_prompt_for_who_has_begun_to_speak(self) -> None:
        with mock.patch.object(chat, "PROMPT_S", 0.2):
            slow, quiet = self.peer("CAP LS 3"), self.peer()
            self.assertEqual(quiet.sock.recv(100), b"Enter your name: ")
            slow.send("02\r\n")
            self.assertRegex(slow.line() or "", "^:chat.local CAP ")

    def test_bad_bytes_and_endless_lines(self) -> None:
        ann, bob = self.two()
        bob.sock.sendall(b"PRIVMSG #chat :\xff\r\nPRIVMSG #chat :a\rb\r\nPRIVMSG #chat :a\0b\r\n" + b"\n" * 10000)
        self.told(bob, ":chat.local FAIL PRIVMSG INVALID_UTF8 :that line is not UTF-8 text")
        self.told(bob, *[f":chat.local NOTICE * :{chat.FAIL_BAD_CHARACTER.text}"] * 2)
        bob.sock.sendall(b"x" * (1 << 20))
        bob.until(" 417 ")
        bob.send("\r\nPRIVMSG #chat :still here\r\n@" + "a" * 4096 + " PRIVMSG #chat :x\r\n")
        bob.until(" 417 ")
        self.assertEqual(ann.sync(), [":bob!bob@localhost PRIVMSG #chat :still here"])

    def test_reset_in_mid_line_shows_one_leave(self) -> None:
        ann, bob = self.two()
        bob.send("PRIVMSG #chat :half a li")
        bob.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        bob.close()
        self.assertIn(" QUIT ", ann.until("bob"))
        self.assertEqual(ann.sync(), [])


class Leaving(ServerCase):
    """What is said of those who leave, and what they say."""

    def setUp(self) -> None:
        super().setUp()
        self.ann, self.eye = self.plain("ann"), self.irc("eye")
        self.bot = self.peer('{"type":"join","user":"bot"}\n')
        self.bot.until("bot joined")

    def leave(self, name: str) -> tuple[str, str, str]:
        """How people, scripts and IRC clients are told that somebody has left."""
        told = json.loads(self.bot.until(f"*** {name} left"))
        return self.ann.until(f"*** {name} left"), told["text"], self.eye.until(f":{name}!{name}@localhost QUIT")

    def test_what_the_server_says_of_a_leave_and_what_the_leaver_says_differ_in_every_dialect(self) -> None:
        self.irc("eve")
        chat.OperatorCommands(self.server).run("/kick eve")
        real = self.leave("eve")
        text = "*** eve left (Thrown out: by the operator)"
        self.assertEqual(real, (text, text, ":eve!eve@localhost QUIT :Thrown out: by the operator"))
        for words in ("Thrown out: by the operator", "(Thrown out: by the operator)", " (Thrown out: by the operator)"):
            with self.subTest(words):
                self.irc("eve").send(f"QUIT :{words}\r\n")
                forged = self.leave("eve")
                text = f"*** eve left: {words.strip()}"
                self.assertEqual(forged, (text, text, f":eve!eve@localhost QUIT :Quit: {words}"))

    def test_a_quit_always_carries_a_reason_on_irc_and_is_short_for_people(self) -> None:
        for begin, end, reason in (
            ("NICK eve\r\nUSER eve 0 * :e\r\nJOIN #chat\r\n", "QUIT\r\n", "Quit: "),
            ("NICK eve\r\nUSER eve 0 * :e\r\nJOIN #chat\r\n", "QUIT :\r\n", "Quit: "),
            ("NICK eve\r\nUSER eve 0 * :e\r\nJOIN #chat\r\n", "", "Connection closed"), ("eve\n", "/quit\n", "Quit: "),
            ("eve\n", "exit\n", "Quit: "), ("eve\n", "", "Connection closed"),
            ('{"type":"join","user":"eve"}\n', '{"type":"leave"}\n', "Quit: "),
            ('{"type":"join","user":"eve"}\n', '{"type":"leave","text":" "}\n', "Quit:  "),
            ('{"type":"join","user":"eve"}\n', "", "Connection closed"),
        ):  # fmt: skip
            with self.subTest(begin=begin, end=end):
                peer = self.peer(begin + end)
                peer.sock.shutdown(socket.SHUT_WR)
                self.assertRegex(self.eye.until(" QUIT"), f"^:eve![a-z]+@localhost QUIT :{reason}$")
                self.assertEqual(self.ann.until("eve left"), "*** eve left")
                self.assertEqual(json.loads(self.bot.until("eve left"))["text"], "*** eve left")

    def test_a_kick_always_carries_a_comment_on_irc_and_is_short_for_people(self) -> None:
        self.ann.send("/mode +o eye\n")
        self.eye.until(" MODE ")
        for name, comment in (("dan", ""), ("eve", " :"), ("fay", " :eye")):
            with self.subTest(comment):
                self.irc(name)
                self.eye.send(f"KICK #chat {name}{comment}\r\n")
                self.assertEqual(self.eye.until(" KICK "), f":eye!eye@localhost KICK #chat {name} :eye")
                self.assertEqual(self.ann.until("kicked"), f"*** {name} was kicked out by eye")
        self.irc("gil")
        self.ann.send("/kick gil\n")
        self.assertEqual(self.eye.until(" KICK "), ":ann!plain@localhost KICK #chat gil :ann")
        self.assertEqual(self.ann.until("kicked"), "*** gil was kicked out by ann")


class IrcAnswers(ServerCase):
    def test_what_is_not_utf8_fails_before_registration_too(self) -> None:
        eve = self.peer("NICK eve\r\nUSER eve 0 * :\r\n")
        eve.sock.sendall(b"USER eve 0 * :\xe8ve\r\nNICK \xe8ve\r\n\xe8 x\r\n")
        failures = [
            f":chat.local FAIL {what} INVALID_UTF8 :that line is not UTF-8 text" for what in ("USER", "NICK", "*")
        ]
        self.told(eve, ":chat.local 461 eve USER :USER needs more than that", *failures)
        eve.send("USER eve 0 * :eve\r\n")
        eve.until(" 001 eve ")

    def test_who_has_not_registered_is_counted_as_unknown(self) -> None:
        ann, eve = self.irc("ann"), self.peer("NICK eve\r\nPING x\r\n")
        eve.until("PONG")
        others = [self.irc("rob"), self.irc("tom")]
        ann.sync()
        wanted = ["251 ann :There are 3 ", "252 ", "253 ann 1 :", "254 ", "255 ", "265 ann 3 3 :", "266 "]
        self.answers(ann, [("LUSERS", wanted)])
        for peer in (*others, eve):
            peer.send("QUIT\r\n")
            peer.rest()
        self.irc("jim")
        self.assertEqual(self.counts(ann), (2, 0, 1))
        self.assertIn(":chat.local 265 ann 2 3 :Current local users 2, max 3", ann.seen)

    def test_a_labelled_message_to_oneself_comes_twice(self) -> None:
        ann = self.irc("ann", "echo-message", "labeled-response", "batch", "message-tags")
        for command, text in (("PRIVMSG", " :me"), ("NOTICE", " :me"), ("TAGMSG", "")):
            ann.send(f"@label=L {command} ann{text}\r\n")
            copy, echo = map(chat.parse, ann.sync())
            self.assertEqual((copy.command, echo.params), (command, copy.params))
            self.assertEqual(dict(echo.tags), {**copy.tags, "label": "L"})

    def test_the_last_line_has_no_source_and_always_a_colon(self) -> None:
        """RFC 1459, section 6, and RFC 2812, 3.7.4: programs look for a line that begins with ERROR."""
        bob = self.irc("bob", *chat.CAPABILITIES)
        bob.send("@label=x QUIT :gone home\r\n")
        self.assertRegex(bob.rest()[-1], r"^(@\S+ )?ERROR :Goodbye$")

    def test_who_is_here_is_told_whole(self) -> None:
        names = [f"friend-number-{number:06}" for number in range(20)]
        for name in names[:-1]:
            self.peer(f"NICK {name}\r\nUSER x 0 * :x\r\n").until(" 376 ")
        self.peer(f"NICK {names[-1]}\r\nCAP LS\r\n").until(" LS ")  # it is taken, by somebody not yet here
        self.peer(f"NICK {names[-1]}\r\n").until(" 433 ")
        ann = self.irc("ann")
        ann.send(f"ISON :{' '.join(names)}\r\nUSERHOST {' '.join(names[15:])}\r\n")
        lines = ann.sync()
        told = " ".join(line.partition(" 303 ann ")[2].lstrip(":") for line in lines if " 303 " in line)
        self.assertEqual(told.split(), names[:-1])
        told = " ".join(line.partition(" 302 ann ")[2].lstrip(":") for line in lines if " 302 " in line)
        self.assertEqual(told.split(), [f"{name}=+x@localhost" for name in names[15:-1]])

    def test_who_has_another_name_has_it_in_lists(self) -> None:
        ann = self.irc("ann")
        ann.send("NAMES #chat\r\nNICK eve\r\nNAMES #chat\r\nJOIN #a,#b\r\nJOIN 0\r\nWHOIS eve\r\n")
        lines = ann.sync()
        self.assertEqual([line[-4:] for line in lines if " 353 " in line][:2], ["@ann", "@eve"])
        self.assertFalse([line for line in lines if " 319 " in line])

    def test_refused_lines_are_called_by_their_command_and_label(self) -> None:
        bob = self.irc("bob", "batch", "labeled-response", "standard-replies")
        for line, answer in (
            (b"@label=L PRIVMSG #chat :\xff\r\n", "@label=L :chat.local FAIL PRIVMSG INVALID_UTF8 :that"),
            (b"@label=L TOPIC #chat :a\rb\r\n", "@label=L :chat.local FAIL TOPIC BAD_CHARACTER :a line"),
            (b"@label=L PRIVMSG #chat :" + b"x" * 600 + b"\r\n", "@label=L :chat.local 417 bob :that line"),
            (b"@label=" + b"L" * 65 + b" \x1b\xff\r\n", ":chat.local FAIL * INVALID_UTF8 :that"),
        ):
            bob.sock.sendall(line)
            self.assertTrue((bob.line() or "").startswith(answer), bob.seen[-1])


class Answers(ServerCase):
    """What there is to ask of a server, and what nobody may do here."""

    def test_lists_of_some_channels(self) -> None:
        ann, bob = self.irc("ann"), self.irc("bob")
        ann.send("JOIN #a1,#a2,#b?\r\nTOPIC #a1 :x\r\nTOPIC #b? :y\r\n")
        ann.sync()
        channels, now = self.server.hub.channels, time.time()
        channels["#a1"].created, channels["#b?"].topic_time = int(now - 300), int(now - 300)
        for asked, wanted in (
            ("#a*", "#a1 #a2"), ("*1", "#a1"), ("#A?", "#a1 #a2"), ("!#a*", "#chat #b?"), ("!#a*,!*t", "#b?"),
            ("#a1,#chat", "#a1 #chat"), ("#b?", "#b?"), ("#a1,#b*", "#a1 #b?"), (">1", "#chat"), ("<2", "#a1 #a2 #b?"),
            ("<2,#a*", "#a1 #a2"), (">0,<1", ""), ("C>4", "#a1"), ("c<4", "#chat #a2 #b?"), ("C<0", ""), ("T>4", "#b?"),
            ("T<4", "#a1"), ("T>0", "#a1 #b?"), ("T<0", ""), ("a*", ""), ("*a" * 11, ""), ("*z,*y,*x,*w,*1", ""),
        ):  # fmt: skip
            with self.subTest(asked):
                bob.send(f"LIST {asked}\r\n")
                found = [chat.parse(line).params[1] for line in bob.sync() if " 322 " in line]
                self.assertEqual(sorted(found), sorted(wanted.split()))

    def test_what_is_not_found_lets_others_in_between_too(self) -> None:
        hub, (ann, _) = self.server.hub, self.two()
        self.exempt("")
        ann.send("JOIN #a,#b,#c\r\n")
        ann.sync()
        for question, steps in (("WHO nobody*", 3), ("LIST nothing*", 6)):
            with mock.patch.object(chat, "QUERY_ROWS", 1), mock.patch.object(hub, "pause") as pause:
                ann.send(f"{question}\r\n")
                ann.sync()
                self.assertEqual(pause.call_count, steps)

    def test_a_long_list_is_cut(self) -> None:
        ann = self.irc("ann")
        ann.send("JOIN #a,#b,#c\r\n")
        ann.sync()
        with mock.patch.object(chat, "MAX_LISTED", 2):
            ann.send("LIST\r\n")
            codes = [chat.parse(line).command for line in ann.sync()]
        self.assertEqual(codes, ["321", "322", "322", "416", "323"])

    def test_a_long_answer_lets_others_in_between(self) -> None:
        hub, ann = self.server.hub, self.irc("ann", "batch", "labeled-response")
        people = [self.irc(f"u{number}") for number in range(5)]
        people[0].sync()
        ann.sync()
        pause, count = hub.pause, 0

        def others_speak() -> None:
            nonlocal count
            count += 1
            people[0].send(f"PRIVMSG #chat :in between {count}\r\n")
            while hub.messages < count:
                pause()

        with mock.patch.object(chat, "QUERY_ROWS", 2), mock.patch.object(hub, "pause", others_speak):
            ann.send("WHO #chat\r\n")
            lines = ann.sync()
            kinds = ["352" if " 352 " in line else line.split(":")[-1] for line in lines]
            between = [f"in between {number}" for number in (1, 2, 3)]
            self.assertEqual([kind for kind in kinds if kind != "352"], [*between, "End of WHO list"])
            self.assertEqual(kinds[:2], ["352", "352"])
            self.assertEqual(kinds.count("352"), 6)
            ann.send("@label=L WHO #chat\r\n")
            lines = [line for line in ann.sync() if "PRIVMSG" not in line]
            self.assertTrue(lines[0].startswith("@label=L :chat.local BATCH +"))
            self.assertEqual((len(lines), count), (9, 6))

    def test_answers_are_weighed_by_their_rows(self) -> None:
        self.exempt("")
        with mock.patch.multiple(chat, QUERY_BURST=10, QUERY_RATE=0.001):
            ann, bob = self.irc("ann"), self.irc("bob")
            for _ in range(10):
                bob.send("WHO #chat\r\n")
            answers = bob.sync()
            self.assertIn(":chat.local 263 bob WHO :WHO is too much now; wait a little", answers)
            self.assertLess(len([line for line in answers if " 352 " in line]), 20)
            for question in ("NAMES #chat", "LIST", "CHATHISTORY LATEST #chat * 1"):  # one account for an address
                ann.send(f"{question}\r\n")
                self.assertIn(f" 263 ann {question.split()[0]} :", ann.until(" 263 "))
            ann.send("PRIVMSG #chat :talking is free\r\n")
            bob.until("talking is free")


class Gone(ServerCase):
    """WHOWAS and MONITOR: those who come and go."""

    def come_and_go(self, name: str, user: str = "x") -> None:
        self.peer(f"NICK {name}\r\nUSER {user} 0 * :{name} {user}\r\nQUIT\r\n").rest()

    def test_those_who_left_are_remembered(self) -> None:
        ann = self.irc("ann")
        self.come_and_go("bob", "one")
        self.come_and_go("Bob", "two")
        self.come_and_go("rob")
        ann.send("NICK eve\r\n")
        one, two, rob = (
            [f" 314 eve {name} {user} localhost * :{name} {user}", f" 312 eve {name} chat.local :20"]
            for name, user in (("bob", "one"), ("Bob", "two"), ("rob", "x"))
        )
        self.answers(ann, [
            ("PING x", ["NICK", "PONG"]),
            ("WHOWAS BOB", [*two, *one, " 369 eve BOB :"]), ("WHOWAS bob 1", [*two, " 369 eve bob :"]),
            ("WHOWAS bob 0", [*two, *one, " 369 "]), ("WHOWAS bob -1", [*two, *one, " 369 "]),
            ("WHOWAS ?ob 2", [*rob, *two, " 369 eve ?ob :"]), ("WHOWAS bob,rob 1", [*rob, " 369 eve bob,rob :"]),
            ("WHOWAS ann", [" 314 eve ann ann localhost * :ann", " 312 ", " 369 "]),
            ("WHOWAS eve", [" 406 eve eve :", " 369 "]), (f"WHOWAS {'*a' * 11}", [" 406 ", " 369 "]),
            ("WHOWAS", [" 461 eve WHOWAS :"]),
        ])  # fmt: skip
        self.server.hub.gone = collections.deque(maxlen=1)
        self.come_and_go("jim")
        self.come_and_go("tom")
        self.answers(ann, [("WHOWAS *", [" 314 eve tom ", " 312 ", " 369 "])])

    def test_names_that_are_monitored(self) -> None:
        ann, bob = self.irc("ann"), self.irc("bob")
        ann.sync()
        on = ":chat.local 730 {0} :{1}!{1}@localhost"
        self.answers(ann, [
            ("MONITOR + Bob,eve", [on.format("ann", "bob"), ":chat.local 731 ann :eve"]),
            ("MONITOR + bob,*!x@y,5", [on.format("ann", "bob")]), ("MONITOR L", [" 732 ann :Bob,eve", " 733 ann :"]),
            ("MONITOR S", [on.format("ann", "bob"), " 731 ann :eve"]), ("MONITOR x", []), ("MONITOR", [" 461 "]),
        ])  # fmt: skip
        eve = self.peer("NICK eve\r\nUSER eve 0 * :eve\r\n")
        eve.until(" 376 ")
        self.assertEqual(ann.sync(), [on.format("*", "eve")])
        eve.send("NICK Eve\r\nNICK rob\r\nNICK EVE\r\nQUIT\r\n")
        eve.rest()
        self.told(ann, ":chat.local 731 * :Eve", ":chat.local 730 * :EVE!eve@localhost", ":chat.local 731 * :EVE")
        self.answers(ann, [("MONITOR - eve,bob", []), ("MONITOR L", [" 733 "]), ("MONITOR + bob", [" 730 "])])
        bob.send("QUIT\r\n")
        bob.rest()
        self.assertEqual([line for line in ann.sync() if " 731 " in line], [":chat.local 731 * :bob"])
        self.answers(ann, [("MONITOR C", []), ("MONITOR S", []), ("MONITOR + ann", [" 730 "])])
        self.assertEqual(list(self.server.hub.monitors), ["ann"])
        with mock.patch.object(chat, "MAX_MONITORED", 3):
            self.answers(ann, [
                ("MONITOR + a,b,c,d", [" 734 ann 3 c,d :Monitor list is full", " 731 ann :a,b"]),
                ("MONITOR + A", [" 731 ann :A"]),
            ])  # fmt: skip
        names = [f"{'x' * 20}{number}" for number in range(60)]
        for start in range(0, 60, 20):
            ann.send(f"MONITOR + {','.join(names[start : start + 20])}\r\n")
        ann.sync()
        ann.send("MONITOR L\r\nQUIT\r\n")
        lines = [line for line in ann.rest() if " 732 " in line]
        self.assertEqual(",".join(line.split(":")[-1] for line in lines), ",".join(["ann", "a", "b", *names]))
        self.assertLess(max(map(len, lines)), chat.LINE_BYTES)
        self.eventually(lambda: not self.server.hub.monitors, "somebody is monitored who is not")

    def test_a_lost_connection_is_not_gone_while_it_may_resume(self) -> None:
        ann, bob = self.irc("ann"), self.irc("bob", token="0123456789abcdef")
        ann.send("MONITOR + bob\r\n")
        ann.sync()
        bob.send("MONITOR + ann\r\nMODE bob +i\r\n")
        bob.sync()
        bob.reset()
        again = self.irc("bob", token="0123456789abcdef")
        self.assertEqual(ann.sync(), [])
        self.answers(again, [("MODE bob", [" 221 bob :+i"]), ("MONITOR L", [" 733 "])])
        self.assertEqual(self.server.hub.invisible, 1)
        again.send("QUIT\r\n")
        self.assertEqual(ann.until(" 731 "), ":chat.local 731 * :bob")
        self.assertEqual((self.server.hub.invisible, list(self.server.hub.monitors)), (0, ["bob"]))

    def test_more_of_those_who_are_monitored_for_who_negotiated_it(self) -> None:
        caps = ("away-notify", "setname", "extended-monitor")
        watchers = [self.irc(f"u{number}", *caps[: number + 1]) for number in range(3)]
        for watcher in watchers:
            watcher.send("PART #chat\r\nMONITOR + bob\r\n")
            watcher.sync()
        bob = self.irc("bob", *caps)
        for watcher in watchers:
            watcher.until(" 730 ")
        bob.send("MONITOR + bob\r\nAWAY :tea\r\nAWAY\r\nSETNAME :Bob\r\n")
        self.assertEqual(len(bob.sync()), 4)
        told = [f":bob!bob@localhost {what}" for what in ("AWAY tea", "AWAY", "SETNAME Bob")]
        self.assertEqual([watcher.sync() for watcher in watchers], [[], [], told])
        watchers[2].send("JOIN #chat\r\n")
        watchers[2].sync()
        bob.send("SETNAME :once\r\n")
        bob.sync()
        self.assertEqual(watchers[2].sync(), [":bob!bob@localhost SETNAME once"])


class Stage(ServerCase):
    """ann, who is operator of #chat, bob, who is in it, and eve outside; exact lines at all of them."""

    def setUp(self) -> None:
        super().setUp()
        self.people = {"ann": self.irc("ann"), "bob": self.irc("bob"), "eve": self.irc("eve")}
        self.people["eve"].send("PART #chat\r\n")
        for name in ("eve", "bob", "ann"):
            self.people[name].sync()

    def play(self, *steps: tuple[str, str, str | dict[str, list[str]]]) -> None:
        """Lets somebody send a line; what they get, or what each gets, but for the server's name, and nothing else."""
        for name, line, wanted in steps:
            with self.subTest(f"{name}: {line}"):
                self.people[name].send(f"{line}\r\n")
                self.people[name].seen.clear()
                got = {name: self.people[name].sync()}
                got.update((other, peer.sync()) for other, peer in self.people.items() if other != name)
                found = {who: [item.replace(":chat.local ", "") for item in lines] for who, lines in got.items()}
                expected = {name: [wanted]} if isinstance(wanted, str) else wanted
                self.assertEqual({who: lines for who, lines in found.items() if lines}, expected)

    @staticmethod
    def names(to: str, channel: str, names: str) -> list[str]:
        return [f"353 {to} = {channel} :{names}", f"366 {to} {channel} :End of NAMES list"]

    def both(self, line: str) -> dict[str, list[str]]:
        return {"ann": [f":ann!ann@localhost {line}"], "bob": [f":ann!ann@localhost {line}"]}


class ChannelModes(Stage):
    def test_asking_and_changing(self) -> None:
        self.people["eve"].send("MODE #chat\r\n")
        created = int(self.people["eve"].sync()[-1].rpartition(":")[2])
        self.assertLess(abs(created - time.time()), PATIENCE)
        self.play(
            ("eve", "MODE #chat", {"eve": ["324 eve #chat :+n", f"329 eve #chat :{created}"]}),
            ("eve", "MODE #chat +m", "442 eve #chat :you are not in #chat"),
            ("bob", "MODE #chat +m", "482 bob #chat :only an operator of #chat may do that"),
            ("ann", "MODE #chat +n", {}),
            ("ann", "MODE #chat +tmi-n+mlk 7 tea", self.both("MODE #chat +tmi-n+lk 7 :tea")),
            ("bob", "MODE #chat", {"bob": ["324 bob #chat +iklmt tea :7", f"329 bob #chat :{created}"]}),
            ("eve", "MODE #chat", {"eve": ["324 eve #chat +iklmt * :7", f"329 eve #chat :{created}"]}),
            ("ann", "MODE #chat +l 07", {}), ("ann", "MODE #chat -lk+n-tmi", self.both("MODE #chat -lk+n-tmi :*")),
            ("ann", "MODE #chat -lk", {}), ("ann", "MODE #chat +m-m+m", self.both("MODE #chat :+m")),
            ("ann", "MODE #nix +m", "403 ann #nix :there is no channel #nix"),
        )  # fmt: skip

    def test_wrong_changes(self) -> None:
        def wrong(mode: str, param: str) -> str:
            return f"696 ann #chat {mode} {param} :mode {mode} cannot be set to that"

        few = "461 ann MODE :MODE needs more than that"
        many = "*a" * 11 + "!*@*"  # parts
        changed = self.both("MODE #chat :+m")
        changed["ann"] += [f"472 ann {mode} :{mode} is not a channel mode here" for mode in "z*"]
        self.play(
            ("ann", "MODE #chat +zmz:", changed), ("ann", "MODE #chat +k", few), ("ann", "MODE #chat +o", few),
            ("ann", "MODE #chat +k :", wrong("k", "*")), ("ann", "MODE #chat +l :", wrong("l", "*")),
            ("ann", "MODE #chat +k a,b", wrong("k", "*")), ("ann", "MODE #chat +k :a b", wrong("k", "*")),
            ("ann", f"MODE #chat +k {'x' * 33}", wrong("k", "*")),
            ("ann", f"MODE #chat +b {'x' * 77}", wrong("b", "x" * 64)), ("ann", "MODE #chat +l 0", wrong("l", "0")),
            ("ann", "MODE #chat +l many", wrong("l", "many")), ("ann", "MODE #chat +b :a b", wrong("b", "a")),
            ("ann", f"MODE #chat +b {many}", wrong("b", many)),
            ("ann", "MODE #chat +o eve", "441 ann eve #chat :eve is not in #chat"),
            ("ann", "MODE #chat +v nobody", "401 ann nobody :nobody here is called nobody"),
            ("ann", "MODE #chat +bbbbbt a b c d e", self.both("MODE #chat +bbbbt a!*@* b!*@* c!*@* :d!*@*")),
        )  # fmt: skip

    def test_ranks(self) -> None:
        self.play(
            ("ann", "MODE #chat +vo-v BOB bob ann", self.both("MODE #chat +vo bob :bob")),
            ("eve", "NAMES #chat", {"eve": self.names("eve", "#chat", "@ann @bob")}),
            ("ann", "MODE #chat -o bob", self.both("MODE #chat -o :bob")),
            ("eve", "NAMES #chat", {"eve": self.names("eve", "#chat", "@ann +bob")}),
            ("eve", "WHO #chat", {"eve": [
                "352 eve #chat ann localhost chat.local ann H@ :0 ann",
                "352 eve #chat bob localhost chat.local bob H+ :0 bob", "315 eve #chat :End of WHO list",
            ]}),
            ("ann", "MODE #chat -o ann", self.both("MODE #chat -o :ann")),
            ("ann", "MODE #chat +o ann", "482 ann #chat :only an operator of #chat may do that"),
        )  # fmt: skip

    def test_who_may_speak(self) -> None:
        def said(text: str) -> list[str]:
            return [f":bob!bob@localhost PRIVMSG #chat :{text}"]

        silent = "404 bob #chat :you are banned from #chat, so you cannot write there"
        self.play(
            ("eve", "PRIVMSG #chat :x", "404 eve #chat :only members may write to #chat"),
            ("ann", "MODE #chat -n", self.both("MODE #chat :-n")),
            ("eve", "PRIVMSG #chat :hi", dict.fromkeys(("ann", "bob"), [":eve!eve@localhost PRIVMSG #chat :hi"])),
            ("ann", "MODE #chat +m", self.both("MODE #chat :+m")),
            ("bob", "PRIVMSG #chat :x", f"404 bob #chat :{chat.ERR_MODERATED.text.format('#chat')}"),
            ("bob", "NOTICE #chat :x", {}),
            ("eve", "PRIVMSG #chat :x", f"404 eve #chat :{chat.ERR_MODERATED.text.format('#chat')}"),
            ("ann", "MODE #chat +v bob", self.both("MODE #chat +v :bob")),
            ("bob", "PRIVMSG #chat :I may", {"ann": said("I may")}),
            ("ann", "MODE #chat -mv+b bob rob", self.both("MODE #chat -mv+b bob :rob!*@*")),
            ("bob", "PRIVMSG #chat :not I", {"ann": said("not I")}),
            ("ann", "MODE #chat +b B?B", self.both("MODE #chat +b :B?B!*@*")), ("bob", "PRIVMSG #chat :x", silent),
            ("bob", "TAGMSG #chat", silent), ("ann", "MODE #chat -b b?b!*@*", self.both("MODE #chat -b :B?B!*@*")),
            ("bob", "PRIVMSG #chat :again", {"ann": said("again")}),
        )  # fmt: skip

    def test_who_may_join(self) -> None:
        joins = dict.fromkeys(("ann", "bob"), [":eve!eve@localhost JOIN #chat"])
        joins["eve"] = [":eve!eve@localhost JOIN #chat", *self.names("eve", "#chat", "@ann bob eve")]
        parts = dict.fromkeys(("ann", "bob", "eve"), [":eve!eve@localhost PART #chat"])
        invited = {"ann": ["341 ann eve :#chat"], "eve": [":ann!ann@localhost INVITE eve :#chat"]}
        self.play(
            ("ann", "MODE #chat +k tea", self.both("MODE #chat +k :tea")),
            ("eve", "JOIN #chat", "475 eve #chat :#chat has a key: join it with the right one"),
            ("eve", "JOIN #chat Tea", "475 eve #chat :#chat has a key: join it with the right one"),
            ("eve", "JOIN #chat tea", joins), ("eve", "PART #chat", parts),
            ("ann", "MODE #chat -k+l tea 2", self.both("MODE #chat -k+l * :2")),
            ("eve", "JOIN #chat", "471 eve #chat :#chat has as many members as it may have"),
            ("ann", "INVITE eve #chat", invited), ("eve", "JOIN #chat", joins), ("eve", "PART #chat", parts),
            ("ann", "MODE #chat +l-l 3", self.both("MODE #chat +l-l :3")),
            ("ann", "MODE #chat +b *@LOCAL*", self.both("MODE #chat +b :*!*@LOCAL*")),
            ("eve", "JOIN #chat", "474 eve #chat :you are banned from #chat"),
            ("ann", "INVITE eve #chat", invited), ("eve", "JOIN #chat", joins), ("eve", "PART #chat", parts),
            ("eve", "JOIN #chat", "474 eve #chat :you are banned from #chat"),
            ("ann", "MODE #chat -b+i *!*@local*", self.both("MODE #chat -b+i :*!*@LOCAL*")),
            ("eve", "JOIN #chat", "473 eve #chat :only who was invited may join #chat"),
            ("bob", "INVITE eve #chat", "482 bob #chat :only an operator of #chat may do that"),
            ("ann", "INVITE eve #chat", invited), ("eve", "JOIN #chat", joins),
            ("ann", "INVITE eve #chat", "443 ann eve #chat :eve is in #chat already"),
            ("eve", "PART #chat", parts), ("eve", "JOIN #chat", "473 eve #chat :only who was invited may join #chat"),
        )  # fmt: skip

    def test_who_speaks_from_outside_hears_the_echo(self) -> None:
        self.people["ann"].send("MODE #chat -n\r\n")
        self.people["ann"].sync()
        rob = self.irc("rob", "echo-message")
        rob.send("PART #chat\r\nPRIVMSG #chat :hi\r\n")
        self.assertEqual(rob.sync()[-1], ":rob!rob@localhost PRIVMSG #chat :hi")

    def test_keys_go_with_their_channels(self) -> None:
        ann, eve = self.people["ann"], self.people["eve"]
        ann.send("JOIN #a,#b,#c\r\nMODE #a +k one\r\nMODE #b +k two\r\n")
        ann.sync()
        eve.send("JOIN #b,#a,#c two,one\r\n")
        joined = [line for line in eve.sync() if " JOIN " in line]
        self.assertEqual(joined, [f":eve!eve@localhost JOIN {name}" for name in ("#b", "#a", "#c")])


class ChannelBans(Stage):
    def test_bans_are_listed_and_bounded(self) -> None:
        ann, eve = self.people["ann"], self.people["eve"]
        for start in range(0, chat.MAX_BANS, 4):
            masks = " ".join(f"u{number}" for number in range(start, start + 4))
            ann.send(f"MODE #chat +bbbb {masks}\r\n")
        for peer in (ann, self.people["bob"]):
            peer.sync()
        self.play(
            ("ann", "MODE #chat +b U7!*@*", {}),
            ("ann", "MODE #chat +b more", "478 ann #chat b :#chat has 100 bans and exceptions; remove one first"),
            ("ann", "MODE #chat -b more", {}),
        )
        for command in ("MODE #chat b", "MODE #chat +b", "MODE #chat -bb"):
            eve.send(f"{command}\r\n")
            *bans, end = eve.sync()
            self.assertEqual(end, ":chat.local 368 eve #chat :End of channel ban list")
            self.assertEqual(len(bans), chat.MAX_BANS)
            self.assertRegex(bans[7], r"^:chat.local 367 eve #chat u7!\*@\* ann!ann@localhost :\d+$")

    @unittest.skipUnless(importlib.util.find_spec("_tracemalloc"), "needs to see what is allocated, as CPython can")
    def test_many_speakers_fill_no_memory_of_a_channel_with_bans(self) -> None:
        import tracemalloc

        self.people["ann"].send("MODE #chat +b *7!*@*\r\n")
        self.people["ann"].until("MODE")
        self.server.hub.gone = collections.deque(maxlen=10)
        with mock.patch.multiple(chat, BANS_CACHED=10, NICK_CHANGES=1 << 20, MEMORY_LINES=10):
            many = self.irc("many")

            def speak(numbers: Iterable[int]) -> int:
                """Says something under many names; how much is held that chat.py has asked for."""
                for number in numbers:
                    many.send(f"NICK n{number}\r\nPRIVMSG #chat :x\r\n")
                    refused = [line for line in many.sync() if " 404 " in line]
                    self.assertEqual(len(refused), number % 10 == 7)
                for peer in self.people.values():
                    peer.sync()
                self.assertEqual(self.counts(), (4, 0, 1))
                gc.collect()
                ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, chat.__file__)])
                return sum(trace.size for trace in ours.traces)

            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            before = speak(range(100))
            self.assertLess(speak(range(100, 1100)) - before, 50_000)  # 1,000 names are more

    def test_one_join_has_a_bounded_number_of_bans_looked_at(self) -> None:
        self.people["ann"].send("JOIN #a,#b\r\nMODE #a +bbb 1 2 3\r\nMODE #b +bbb 1 2 3\r\n")
        eve = self.people["eve"]
        self.people["ann"].sync()
        with mock.patch.object(chat, "BAN_CHECKS", 5):
            eve.send("JOIN #a,#b,#c\r\n")
            heard = [re.sub("^:[^ ]+ ", "", line) for line in eve.sync() if re.search("JOIN| 263 ", line)]
            self.assertEqual(heard, ["JOIN #a", "263 eve JOIN :JOIN is too much now; wait a little"] + heard[2:])
            eve.send("JOIN #a,#b,#c\r\n")
            self.assertIn(":eve!eve@localhost JOIN #b", eve.sync())
        self.assertEqual(self.counts()[2], 4)

    def test_exceptions_from_bans_and_from_invitations(self) -> None:
        self.server.hub.replay = 0
        ann, eve = self.people["ann"], self.people["eve"]
        joins = dict.fromkeys(("ann", "bob"), [":eve!eve@localhost JOIN #chat"])
        joins["eve"] = [":eve!eve@localhost JOIN #chat", *self.names("eve", "#chat", "@ann bob eve")]
        parts = dict.fromkeys(("ann", "bob", "eve"), [":eve!eve@localhost PART #chat"])
        said = dict.fromkeys(("ann", "bob"), [":eve!eve@localhost PRIVMSG #chat :x"])
        silent = "404 {0} #chat :you are banned from #chat, so you cannot write there"
        everybody = self.both("MODE #chat -e :EVE!*@*")
        everybody["eve"] = everybody["ann"]
        self.play(
            ("bob", "MODE #chat +e bob", "482 bob #chat :only an operator of #chat may do that"),
            ("ann", "MODE #chat +be *@local* EVE", self.both("MODE #chat +be *!*@local* :EVE!*@*")),
            ("ann", "MODE #chat +e eve!*", {}), ("bob", "PRIVMSG #chat :x", silent.format("bob")),
            ("eve", "JOIN #chat", joins),
            ("eve", "PRIVMSG #chat :x", said), ("ann", "MODE #chat -e eve", everybody),
            ("eve", "PRIVMSG #chat :x", silent.format("eve")), ("eve", "PART #chat", parts),
            ("ann", "MODE #chat -b+iI *!*@local* eve", self.both("MODE #chat -b+iI *!*@local* :eve!*@*")),
            ("eve", "JOIN #chat", joins), ("eve", "PART #chat", parts),
        )  # fmt: skip
        who = "ann!ann@localhost :"
        wanted = ["349 eve #chat :", f"346 eve #chat eve!*@* {who}", "347 eve ", "368 eve "]
        self.answers(eve, [("MODE #chat eIb", wanted)])
        self.play(
            ("ann", "MODE #chat -I eve!*@*", self.both("MODE #chat -I :eve!*@*")),
            ("eve", "JOIN #chat", "473 eve #chat :only who was invited may join #chat"),
        )
        ann.send("MODE #chat +e bob\r\nMODE #chat +I x?\r\n")
        ann.sync()
        channel = self.server.hub.channels["#chat"]
        again = chat.Channel.restored(channel.state())
        self.assertEqual(again.masks, channel.masks)
        self.assertEqual([list(masks) for masks in again.masks.values()], [[], ["bob!*@*"], ["x?!*@*"]])
        before = {**json.loads(channel.state()), "bans": [["a!*@*", "ann", "1"]]}
        del before["exceptions"]  # as older servers have written it
        self.assertEqual(list(chat.Channel.restored(json.dumps(before)).masks["b"]), ["a!*@*"])


class Hidden(Stage):
    """Who and what is shown to whom, and what may be said to whom."""

    @staticmethod
    def listed(to: str, *rows: str) -> dict[str, list[str]]:
        return {to: [f"321 {to} Channel :Users  Name", *(f"322 {to} {row}" for row in rows), f"323 {to} :End of LIST"]}

    def channels_of_ann(self) -> list[str]:
        self.people["eve"].send("WHOIS ann\r\n")
        return [line.partition(" 319 eve ann ")[2] for line in self.people["eve"].sync() if " 319 " in line]

    def test_a_secret_channel_is_hidden_from_strangers(self) -> None:
        self.assertEqual(self.channels_of_ann(), [":@#chat"])
        self.play(
            ("ann", "MODE #chat +s", self.both("MODE #chat :+s")),
            ("eve", "NAMES #chat", "366 eve #chat :End of NAMES list"),
            ("eve", "WHO #chat", "315 eve #chat :End of WHO list"), ("eve", "LIST", self.listed("eve")),
            ("eve", "LIST #chat", self.listed("eve")), ("bob", "LIST", self.listed("bob", "#chat 2 :")),
            ("bob", "NAMES #chat", {"bob": ["353 bob @ #chat :@ann bob", "366 bob #chat :End of NAMES list"]}),
        )  # fmt: skip
        self.assertEqual(self.channels_of_ann(), [])
        tom = self.plain("tom")
        tom.send("/join #tea\n/who #chat\n")
        tom.until("*** Error: there is no channel #chat")

    def test_who_is_invisible_is_hidden_from_strangers(self) -> None:
        bob = "352 {0} {1} bob localhost chat.local bob {2} :0 bob"
        self.play(
            ("bob", "MODE bob +i", ":bob!bob@localhost MODE bob :+i"),
            ("eve", "NAMES #chat", {"eve": self.names("eve", "#chat", "@ann")}),
            ("bob", "NAMES #chat", {"bob": self.names("bob", "#chat", "@ann bob")}),
            ("eve", "WHO B*", "315 eve B* :End of WHO list"),
            ("eve", "WHO BOB", {"eve": [bob.format("eve", "*", "H"), "315 eve BOB :End of WHO list"]}),
            ("ann", "WHO b?b!*@l*", {"ann": [bob.format("ann", "*", "H"), "315 ann b?b!*@l* :End of WHO list"]}),
            ("eve", "WHO *", {"eve": [
                f"352 eve * {name} localhost chat.local {name} H :0 {name}" for name in ("ann", "eve")
            ] + ["315 eve * :End of WHO list"]}),
            ("eve", "WHO #chat", {"eve": [
                "352 eve #chat ann localhost chat.local ann H@ :0 ann", "315 eve #chat :End of WHO list",
            ]}),
            ("eve", f"WHO {'*a' * 11}", f"315 eve {'*a' * 11} :End of WHO list"),
        )  # fmt: skip
        self.answers(self.people["eve"], [
            ("WHOIS bob", [" 311 ", " 312 ", " 317 ", " 318 "]),
            ("LUSERS", ["251 eve :There are 2 users and 1 invisible on 1 servers", *[""] * 4, "265 eve 3 3 :", "266 "]),
        ])  # fmt: skip
        self.people["ann"].send("MODE ann +i\r\nPART #chat\r\n")
        self.people["ann"].sync()
        self.people["bob"].sync()
        self.play(("eve", "NAMES #chat", "366 eve #chat :End of NAMES list"))
        self.people["bob"].send("QUIT\r\n")
        self.people["bob"].rest()
        self.answers(self.people["eve"], [("LUSERS", ["251 eve :There are 1 users and 1 invisible ", *[""] * 6])])

    def test_a_bot_shows_that_it_is_one(self) -> None:
        rob = self.irc("rob", "message-tags")
        self.people["bob"].send(
            "MODE bob +B\r\nPRIVMSG rob :beep\r\nPRIVMSG #chat :boop\r\nNICK tom\r\nPRIVMSG rob :x\r\n"
        )
        lines = [chat.parse(rob.until(what)) for what in ("beep", "boop", "NICK", ":x")]
        self.assertEqual([message.tags.get("bot") for message in lines], [""] * 4)
        self.answers(rob, [
            ("WHO #chat", ["", " tom HB :0 bob", "", ""]),
            ("WHOIS tom", [" 311 ", " 319 ", " 312 ", " 335 rob tom :is a bot", " 317 ", " 318 "]),
        ])  # fmt: skip
        self.people["ann"].send("PRIVMSG rob :no bot\r\n")
        self.assertNotIn("bot", chat.parse(rob.until(":no bot")).tags)

    def test_ctcp_and_messages_to_those_of_a_rank(self) -> None:
        def said(by: str, to: str, *hearers: str, text: str = "hi") -> dict[str, list[str]]:
            return dict.fromkeys(hearers, [f":{by}!{by}@localhost PRIVMSG {to} :{text}"])

        refused = "404 {0} #chat :no CTCP but ACTION, which is /me, may be sent to #chat"
        self.people["eve"].send("JOIN #chat\r\n")
        for name in ("eve", "ann", "bob"):
            self.people[name].sync()
        all_three = dict.fromkeys(("ann", "bob", "eve"), [":ann!ann@localhost MODE #chat +vC :bob"])
        self.play(
            ("bob", "PRIVMSG #chat :\1PING 1\1", said("bob", "#chat", "ann", "eve", text="\1PING 1\1")),
            ("ann", "MODE #chat +vC bob", all_three), ("ann", "PRIVMSG #chat :\1PING 1\1", refused.format("ann")),
            ("eve", "NOTICE #chat :\1PING 1\1", {}), ("eve", "PRIVMSG +#chat :\1VERSION\1", refused.format("eve")),
            ("eve", "PRIVMSG #chat :\1ACTION x\1", said("eve", "#chat", "ann", "bob", text="\1ACTION x\1")),
            ("eve", "PRIVMSG @#CHAT :hi", said("eve", "@#chat", "ann")),
            ("eve", "PRIVMSG +#chat :hi", said("eve", "+#chat", "ann", "bob")),
            ("ann", "PRIVMSG +#chat,@#chat :hi", said("ann", "+#chat", "bob")),
            ("ann", "PRIVMSG @#nix :hi", "403 ann #nix :there is no channel #nix"),
            ("eve", "PRIVMSG +ann :hi", "401 eve +ann :nobody here is called +ann"),
        )  # fmt: skip
        rob = self.irc("rob", "echo-message", "draft/chathistory", "batch")
        rob.send("PRIVMSG @#chat :help\r\nCHATHISTORY LATEST #chat * 9\r\n")
        lines = rob.sync()
        self.assertEqual(lines[0], ":rob!rob@localhost PRIVMSG @#chat :help")
        self.assertEqual(len(lines), 5, lines)  # what was said to all

    def test_a_message_to_many_of_a_rank_costs_as_much_as_one_to_the_channel(self) -> None:
        self.people["ann"].send("MODE #chat +v bob\r\n")
        self.exempt("")
        rob = self.irc("rob")
        self.people["ann"].send("MODE #chat +o rob\r\n")
        rob.until(" MODE ")
        bucket = self.server.hub.nicks["rob"].flood_bucket
        with mock.patch.object(chat.TokenBucket, "debit", autospec=True) as debit:
            debit.return_value = 0.0
            rob.send("PRIVMSG +#chat :hi\r\n")
            self.people["bob"].until("+#chat :hi")
            self.assertEqual([x.args[2] for x in debit.mock_calls if x.args[0] is bucket and len(x.args) > 2], [])
            rob.send("PRIVMSG +#chat,@#chat :hi\r\n")
            self.people["ann"].until("@#chat :hi")
            self.assertEqual([x.args[2] for x in debit.mock_calls if x.args[0] is bucket and len(x.args) > 2], [1])


class Operators(Stage):
    def test_an_invitation_by_who_is_no_operator_opens_nothing(self) -> None:
        asked = {"bob": ["341 bob eve :#chat"], "eve": [":bob!bob@localhost INVITE eve :#chat"]}
        self.play(
            ("bob", "INVITE eve #chat", asked), ("ann", "MODE #chat +i", self.both("MODE #chat :+i")),
            ("eve", "JOIN #chat", "473 eve #chat :only who was invited may join #chat"),
            ("eve", "INVITE bob #chat", "442 eve #chat :you are not in #chat"),
        )  # fmt: skip

    def test_old_invitations_are_forgotten(self) -> None:
        self.people["ann"].send("JOIN #a,#b\r\nMODE #chat +i\r\nMODE #a +i\r\nMODE #b +i\r\n")
        self.people["ann"].sync()
        with mock.patch.object(chat, "MAX_JOINS", 2):
            for name in ("#chat", "#a", "#b"):
                self.people["ann"].send(f"INVITE eve {name}\r\n")
            self.people["ann"].sync()
        self.people["eve"].send("JOIN #chat,#a,#b\r\n")
        answers = [line.split()[1:4] for line in self.people["eve"].sync()]
        self.assertEqual([words[2] for words in answers if words[0] == "473"], ["#chat"])
        self.assertEqual([words[1] for words in answers if words[0] == "JOIN"], ["#a", "#b"])

    def test_kick(self) -> None:
        out = ":ann!ann@localhost KICK #chat bob"
        self.play(
            ("bob", "KICK #chat ann", "482 bob #chat :only an operator of #chat may do that"),
            ("eve", "KICK #chat ann", "442 eve #chat :you are not in #chat"),
            ("ann", "KICK #chat eve,nobody", {
                "ann": ["441 ann eve #chat :eve is not in #chat", "401 ann nobody :nobody here is called nobody"]
            }),
            ("ann", "KICK #chat Bob,eve :too loud", {
                "ann": [f"{out} :too loud", "441 ann eve #chat :eve is not in #chat"], "bob": [f"{out} :too loud"],
            }),
            ("bob", "PRIVMSG #chat :x", "404 bob #chat :only members may write to #chat"),
            ("ann", "KICK #chat a,b,c,d,e", "407 ann :that is too many names in one command"),
            ("bob", "JOIN #tea", {"bob": [":bob!bob@localhost JOIN #tea", *self.names("bob", "#tea", "@bob")]}),
            ("ann", "JOIN #tea", {
                "ann": [":ann!ann@localhost JOIN #tea", *self.names("ann", "#tea", "@bob ann")],
                "bob": [":ann!ann@localhost JOIN #tea"],
            }),
            ("bob", "KICK #tea bob,ann", {
                "ann": [":bob!bob@localhost KICK #tea bob :bob"],
                "bob": [":bob!bob@localhost KICK #tea bob :bob", "442 bob #tea :you are not in #tea"],
            }),
            ("ann", "PART #tea", ":ann!ann@localhost PART #tea"),
            ("bob", "JOIN #chat", {
                "ann": [":bob!bob@localhost JOIN #chat"],
                "bob": [":bob!bob@localhost JOIN #chat", *self.names("bob", "#chat", "@ann bob")],
            }),
            ("ann", "KICK #nix,#chat eve,bob", {
                "ann": [f"{out} :ann", "403 ann #nix :there is no channel #nix"], "bob": [f"{out} :ann"]
            }),
        )  # fmt: skip
        self.assertEqual(self.counts()[2], 1)

    def test_the_topic_of_a_channel_with_t(self) -> None:
        self.play(
            ("bob", "TOPIC #chat :tea", dict.fromkeys(("ann", "bob"), [":bob!bob@localhost TOPIC #chat :tea"])),
            ("ann", "MODE #chat +t", self.both("MODE #chat :+t")),
            ("bob", "TOPIC #chat :rum", "482 bob #chat :only an operator of #chat may do that"),
            ("ann", "TOPIC #chat :rum", self.both("TOPIC #chat :rum")),
        )

    def test_an_operator_who_comes_back_is_one_still(self) -> None:
        enter = (
            f"CAP REQ :{chat.RESUME_CAP} extended-join\r\nRESUME 0123456789abcdef\r\nNICK rob\r\nUSER rob 0 * :Rob\r\n"
        )
        rob = self.peer(f"{enter}CAP END\r\nJOIN #tea\r\n")
        rob.until(" 366 ")
        self.people["ann"].send("JOIN #tea\r\n")
        rob.until("JOIN #tea")
        again = self.peer(f"{enter}CAP END\r\n")
        again.until(":rob!rob@localhost JOIN #tea * :Rob")
        self.assertEqual(again.until(" 353 "), ":chat.local 353 rob = #tea :ann @rob")
        again.send("MODE #tea +m\r\n")
        self.assertEqual(again.sync()[-1], ":rob!rob@localhost MODE #tea :+m")

    def test_plain_people_and_scripts(self) -> None:
        tom, bot = self.plain("tom"), self.peer('{"type":"join","user":"bot"}\n')
        bot.until("bot joined")
        self.people["ann"].send("MODE #chat +mv tom\r\nKICK #chat tom :too loud\r\nKICK #chat bot\r\n")
        tom.until("*** bot joined")
        self.told(tom, "*** ann set +mv tom", "*** tom was kicked out by ann: too loud")
        events = [json.loads(bot.line() or "") for _ in range(3)]
        self.assertEqual(
            [(item["event"], item["channel"]) for item in events], [("mode", "#chat"), *[("kick", "#chat")] * 2]
        )
        self.assertEqual([item.get("name") for item in events], [None, "tom", "bot"])
        tom.send("hello?\n/who\n/join #chat\nhello?\n/kick ann\n/mode\n")
        for text in ("you are in no channel; /join one first",) * 2:
            self.assertEqual(tom.line(), f"*** Error: {text}")
        self.told(
            tom, "*** tom joined (3 here)", f"*** Error: {chat.ERR_MODERATED.text.format('#chat')}",
            "*** Error: only an operator of #chat may do that", "*** The modes of #chat are: +mn",
        )  # fmt: skip
        tom.send("/join #tea\n/mode +k green\n/invite eve\n/mode +b rob\n/mode b\n/kick tom bye\n")
        tom.until("joined (1 here)")
        self.told(
            tom, "*** tom set +k green", "*** You invited eve to #tea", "*** tom set +b rob!*@*",
            "*** Banned from #tea: rob!*@*, by tom!plain@localhost", "*** End of channel ban list",
            "*** tom was kicked out by tom: bye",
        )  # fmt: skip
        self.people["eve"].until(":tom!plain@localhost INVITE eve :#tea")

    def test_who_is_refused_entry_stays_where_they_are(self) -> None:
        self.people["ann"].send("JOIN #tea\r\nMODE #tea +k green\r\n")
        self.people["ann"].sync()
        self.limit(all_channels=2)
        tom = self.plain("tom")
        tom.send("/join #tea\n/join #other\n/who\n/join #tea green\n")
        self.told(
            tom, "*** Error: #tea has a key: join it with the right one",
            "*** Error: #other would be one channel too many", "*** In #chat: @ann bob tom",
            "*** tom left: went to #tea", "*** tom joined (2 here)",
        )  # fmt: skip


class Capabilities(ServerCase):
    """What a client gets only if it negotiated that it understands it."""

    LABELS = ("batch", "labeled-response", "message-tags", "server-time")

    def pair(self, *caps: str) -> tuple[Peer, Peer, Peer]:
        """One with the capabilities, one without, and bob, whom they are about."""
        able, plain, bob = self.irc("able", *caps), self.irc("plain"), self.irc("bob")
        for peer in (able, plain):
            peer.until("bob!bob@localhost JOIN")
        return able, plain, bob

    def test_notify_is_implied_by_302(self) -> None:
        for first, caps in (("CAP LS 302", "cap-notify"), ("CAP LS", "")):
            peer = self.peer(f"{first}\r\nCAP REQ :-cap-notify\r\nCAP LIST\r\n")
            self.assertEqual(peer.until(" LIST "), f":chat.local CAP * LIST :{caps}")
        self.assertLessEqual(len(peer.seen[0]) + 2 + chat.NICK_BYTES, chat.LINE_BYTES)

    def test_extended_join(self) -> None:
        able, plain, bob = self.pair("extended-join")
        bob.send("JOIN #tea\r\nPART #chat\r\nSETNAME :Bob the Great\r\nJOIN #chat\r\n")
        self.assertEqual(able.until("JOIN"), ":bob!bob@localhost JOIN #chat * :Bob the Great")
        self.assertEqual(plain.until("JOIN"), ":bob!bob@localhost JOIN #chat")

    def test_away_notify(self) -> None:
        able, plain, bob = self.pair("away-notify")
        able.send("JOIN #tea\r\n")
        able.sync()
        bob.send("JOIN #tea\r\nAWAY :tea time\r\nAWAY :tea time\r\nPART #chat\r\nJOIN #chat\r\nAWAY\r\n")
        self.assertNotIn("bob!bob@localhost AWAY", "".join(bob.sync()))
        self.assertEqual(able.sync(), [
            ":bob!bob@localhost JOIN #tea", ":bob!bob@localhost AWAY :tea time", ":bob!bob@localhost PART #chat",
            ":bob!bob@localhost JOIN #chat", ":bob!bob@localhost AWAY :tea time", ":bob!bob@localhost AWAY",
        ])  # fmt: skip
        self.assertEqual(plain.sync(), [":bob!bob@localhost PART #chat", ":bob!bob@localhost JOIN #chat"])

    def test_changes_that_all_are_told_are_throttled(self) -> None:
        able, _, bob = self.pair("away-notify")
        bob.send("".join(f"AWAY :{number}\r\n" for number in range(100)))
        refused = [line for line in bob.sync() if " 263 bob AWAY :AWAY is too much now" in line]
        self.assertEqual(len(refused), 100 - chat.NICK_CHANGES)
        self.assertEqual(len(able.sync()), chat.NICK_CHANGES)

    def test_setname(self) -> None:
        able, plain, bob = self.pair("setname", "standard-replies")
        able.send(f"SETNAME :Able Seaman\r\nSETNAME :\r\nSETNAME :{'x' * 101}\r\nWHOIS able\r\n")
        self.told(
            able, ":able!able@localhost SETNAME :Able Seaman",
            *[":chat.local FAIL SETNAME INVALID_REALNAME :a real name has 1 to 100 bytes"] * 2,
            ":chat.local 311 able able able localhost * :Able Seaman",
        )  # fmt: skip
        bob.send("SETNAME :\r\nSETNAME :Bob\r\n")
        self.assertEqual(able.until("SETNAME"), ":bob!bob@localhost SETNAME Bob")
        self.assertEqual(bob.sync() + plain.sync(), [":chat.local NOTICE * :a real name has 1 to 100 bytes"])

    def test_invite_notify(self) -> None:
        able, plain, bob = self.pair("invite-notify")
        bob.send("PART #chat\r\n")
        for peer in (able, plain):
            peer.until("PART")
        plain.send("INVITE bob #chat\r\n")
        self.assertEqual(plain.sync(), [":chat.local 341 plain bob :#chat"])
        for peer in (able, bob):
            self.assertEqual(peer.until("INVITE"), ":plain!plain@localhost INVITE bob :#chat")

    def test_names_and_ranks(self) -> None:
        op = self.irc("op")
        for caps, names, flags in (
            ((), "@op", "H@"), (("multi-prefix",), "@+op", "H@+"), (("userhost-in-names",), "@op!op@localhost", "H@"),
            (("multi-prefix", "userhost-in-names"), "@+op!op@localhost", "H@+"),
        ):  # fmt: skip
            with self.subTest(caps):
                peer = self.irc("ann", *caps)
                op.send("MODE #chat +v op\r\n")
                op.sync()
                peer.sync()
                peer.send("NAMES #chat\r\nWHO op\r\nWHO #chat %nf\r\nWHOIS op\r\n")
                self.assertEqual(
                    peer.line(), f":chat.local 353 ann = #chat :{names} ann{'!ann@localhost' * ('!' in names)}"
                )
                self.assertEqual(peer.until(" 352 "), ":chat.local 352 ann * op localhost chat.local op H :0 op")
                self.assertEqual(peer.until(" 354 "), f":chat.local 354 ann op :{flags}")
                self.assertEqual(peer.until(" 319 "), f":chat.local 319 ann op :{flags[1:]}#chat")
                peer.send("QUIT\r\n")
                peer.rest()

    def test_what_a_labeled_command_makes_all_see_carries_the_label(self) -> None:
        ann, bob = self.irc("ann", "away-notify", *self.LABELS), self.irc("bob")
        bob.send("JOIN #tea\r\n")
        bob.sync()
        ann.sync()
        for command, answer in (
            ("AWAY x", "306 ann :You are marked as away"), ("JOIN #chat", "ACK"),
            ("INVITE bob #chat", "443 ann bob #chat :bob is in #chat already"),
        ):  # fmt: skip
            ann.send(f"@label=L {command}\r\n")
            self.assertEqual(ann.sync(), [f"@label=L :chat.local {answer}"])
        self.irc("eve").send("PART #chat\r\n")
        ann.until(" PART ")
        ann.send("AWAY\r\n@label=L INVITE eve #chat\r\n")
        self.assertEqual(ann.sync()[1:], ["@label=L :chat.local 341 ann eve :#chat"])
        for command, seen in (
            ("TOPIC #chat tea", "TOPIC #chat :tea"), ("MODE #chat +m", "MODE #chat :+m"),
            ("KICK #chat bob", "KICK #chat bob :ann"), ("PART #chat", "PART #chat"), ("NICK anna", "NICK :anna"),
        ):  # fmt: skip
            with self.subTest(command):
                ann.send(f"@label=L {command}\r\n")
                (line,) = ann.sync()
                self.assertRegex(line, f"^@time=[^;]*;msgid=[^;]*;label=L :ann!ann@localhost {re.escape(seen)}$")
        self.assertIn(":ann!ann@localhost KICK #chat bob :ann", bob.sync())
        ann.send("@label=L JOIN #tea\r\n")
        first, *inside, last = [chat.parse(line) for line in ann.sync()]
        self.assertEqual((first.command, first.tags["label"], last.command), ("BATCH", "L", "BATCH"))
        self.assertEqual([message.command for message in inside], ["JOIN", "353", "366"])
        self.assertEqual({message.tags["batch"] for message in inside}, {first.param(0)[1:]})
        self.assertEqual(bob.sync(), [":anna!ann@localhost JOIN #tea"])
        ann.send("@label=L QUIT\r\n")
        self.assertEqual(ann.rest(), ["ERROR :Goodbye"])
        self.assertEqual(bob.sync(), [":anna!ann@localhost QUIT :Quit: "])


class Identity(ServerCase):
    def test_exactly_one_of_many_gets_a_name(self) -> None:
        peers = [self.peer() for _ in range(20)]
        gate = threading.Barrier(len(peers))
        answers: list[str | None] = []

        def ask(peer: Peer) -> None:
            gate.wait(PATIENCE)
            peer.send("bob\n")
            answers.append(peer.line())

        with at_once(*(functools.partial(ask, peer) for peer in peers)):
            pass
        self.assertEqual(answers.count("*** bob joined (1 here)"), 1)
        self.assertEqual(answers.count("*** Error: that name is taken; choose another"), 19)

    def test_a_name_is_free_after_its_holder_left(self) -> None:
        self.plain("bob").close()
        self.eventually(lambda: self.peer("bob\n").line() == "*** bob joined (1 here)", "bob's name was not freed")

    def test_a_ghost_loses_its_name_when_somebody_asks(self) -> None:
        ghost = self.irc("bob")
        with mock.patch.object(chat, "GHOST_PING_S", 0.1):
            time.sleep(0.15)  # the ghost must have been silent for PROBE_S
            late = self.peer("NICK bob\r\n")
            late.until(" 433 ")
            ghost.until("PING")
            self.eventually(lambda: self.counts()[0] == 0, "the ghost kept its name")
        self.assertEqual(ghost.rest(), [f"{ERROR}Ping timeout"])

    def test_who_answers_is_no_ghost(self) -> None:
        holder = self.irc("bob")
        with mock.patch.object(chat, "GHOST_PING_S", 0.3):
            time.sleep(0.35)
            self.peer("NICK bob\r\n").until(" 433 ")
            holder.until("PING")
            holder.send("PONG chat.local\r\n")
            time.sleep(0.6)  # past the probe's deadline
            self.assertEqual(holder.sync(), [])

    def test_name_changes_are_throttled(self) -> None:
        ann, bob = self.two()
        bob.send("".join(f"NICK bob{number}\r\n" for number in range(100)))
        refused = [line for line in bob.sync() if " 438 " in line]
        self.assertEqual(len(refused), 100 - chat.NICK_CHANGES)
        self.assertEqual(len(ann.sync()), chat.NICK_CHANGES)

    def test_channels_are_capped(self) -> None:
        bob = self.irc("bob")
        for start in range(0, 1000, 20):
            bob.send("JOIN " + ",".join(f"#c{number}" for number in range(start, start + 20)) + "\r\n")
        refused = [line for line in bob.sync() if " 405 " in line]
        self.assertEqual(len(refused), 1001 - chat.Limits().channels)
        self.assertEqual(self.counts()[2], chat.Limits().channels)


class Pressure(ServerCase):
    def test_silent_connections_are_closed(self) -> None:
        self.limit(register_s=1.5)
        with mock.patch.object(chat, "PROMPT_S", 0.1):
            silent = [self.peer() for _ in range(500)]
            for peer in silent:
                self.assertEqual(peer.rest()[-1:], ["Enter your name: *** No name within 2 seconds"])
        self.eventually(lambda: self.counts() == (0, 0, 0), "sessions were left")

    def test_a_name_in_drips_is_cut_off(self) -> None:
        self.limit(register_s=0.3)
        slow = self.peer()
        with mock.patch.object(chat, "CLOSE_GRACE_S", 0.1), contextlib.suppress(OSError):
            while True:
                slow.send("x")
                time.sleep(0.02)
        self.assertEqual(slow.rest()[-1:], ["*** No name within 0 seconds"])

    def test_a_storm_of_connections(self) -> None:
        ann, bob = self.irc("ann"), self.irc("bob")
        before = threading.active_count()

        def storm() -> None:
            for number in range(200):
                sock = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
                if number % 2:  # reset
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    sock.send(b"NICK ")
                sock.close()

        with at_once(*[storm] * 5):
            self.write(bob, 200)
            for number in range(200):
                self.assertTrue(ann.until("PRIVMSG #chat").endswith(f" {number}"))
        for peer in [self.irc(f"u{number}") for number in range(50)]:
            peer.close()
        self.eventually(lambda: self.connections() == 2, "connections were left")
        self.eventually(lambda: threading.active_count() <= before, "threads were left")
        self.assertEqual(self.counts(), (2, 0, 1))

    def test_pings_keep_the_living_and_end_the_dead(self) -> None:
        self.limit(ping_s=0.2, pong_s=1.0)
        dead, alive = self.irc("dead"), self.irc("alive")
        while " QUIT " not in (alive.line() or self.fail("the living was dropped, too")):
            if alive.seen[-1].startswith("PING"):
                alive.send("PONG chat.local\r\n")
        self.assertEqual(alive.seen[-1], ":dead!dead@localhost QUIT :Ping timeout")
        self.assertEqual(dead.rest()[-1], f"{ERROR}Ping timeout")

    def test_who_does_not_read_is_dropped_and_nobody_else_notices(self) -> None:
        self.limit(outbox=1 << 16)
        ann, bob = self.irc("ann"), self.irc("bob")
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", self.port))
        stalled = Peer(self.port, "NICK mud\r\nUSER mud 0 * :mud\r\nJOIN #chat\r\n", sock)
        self.addCleanup(stalled.close)
        ann.until("mud!mud@localhost JOIN")
        texts: list[str] = []
        with at_once(functools.partial(self.write, bob, 30000)), self.logs(logging.WARNING):
            while len(texts) < 30000:
                line = ann.line() or self.fail("ann was dropped")
                if "PRIVMSG" in line:
                    texts.append(line.rpartition(" ")[2])
        self.assertEqual(texts, [str(number) for number in range(30000)])
        gone = ":mud!mud@localhost QUIT :Reads too slowly"
        if gone not in ann.seen:
            self.assertEqual(ann.until(" QUIT "), gone)
        self.eventually(lambda: not self.is_here("mud", ann), "its name was not freed")

    def test_what_a_slow_reader_owes_comes_in_order(self) -> None:
        self.read_slowly(self.peer)
        used = time.process_time()
        time.sleep(0.2)  # in which the server has nothing to do
        self.assertLess(time.process_time() - used, 0.1, "it spins")

    def test_a_flood_of_questions_about_the_past_is_bounded(self) -> None:
        ann, bob = self.irc("ann"), self.irc("bob", "batch", "draft/chathistory")
        ann.send("".join(f"PRIVMSG #chat :{number} {'x' * 300}\r\n" for number in range(100)))
        ann.sync()
        longest = 0
        commit = chat.commit

        def watched(hub: chat.Hub, batch: list[chat.Call]) -> list[chat.Effect]:
            nonlocal longest
            effects = commit(hub, batch)
            messages = sum(len(effect.messages) for effect in effects if isinstance(effect, chat.Multicast))
            longest = max(longest, messages)
            return effects

        with mock.patch.object(chat, "commit", watched), self.logs():
            bob.send("CHATHISTORY LATEST #chat * 100\r\n" * 2000)
            ann.sync()
            self.eventually(lambda: not self.is_here("bob", ann), "who does not read is not dropped")
        self.assertLess(longest, 2 * chat.LOG_ENTRIES)

    def test_everybody_sees_the_same_order(self) -> None:
        self.talk_at_once(self.peer, 300)

    def test_equal_views_need_not_be_one_object(self) -> None:
        with mock.patch.multiple(chat, irc=chat.Irc, framed=chat.Framed, plain=chat.Plain):
            self.talk_at_once(self.peer, 20)
            ann, bob = self.plain("ann"), self.irc("bob")
            for change in ("CAP REQ :server-time", "CAP REQ :-server-time", "PART #chat", "JOIN #chat"):
                bob.send(f"{change}\r\n")
                bob.sync()
                ann.send("hello\n/who\n")
                ann.until("In #chat")
                self.assertEqual("PRIVMSG #chat :hello" in "\n".join(bob.sync()), not change.startswith("PART"))

    def test_full_server_says_so(self) -> None:
        self.limit(clients=1)
        self.plain("ann")
        with self.logs(logging.WARNING):
            self.assertEqual(self.peer().rest(), [f"ERROR :{chat.FULL}"])

    def test_threads_that_cannot_be_started(self) -> None:
        self.plain("bob")
        broken = mock.patch("_thread.start_new_thread", side_effect=RuntimeError("can't start new thread"))
        with broken, self.logs(logging.WARNING):
            self.assertEqual(self.peer().rest(), [f"*** {chat.FULL}"])
        self.plain("ann")

    def test_a_socket_that_is_gone_before_it_is_set_up(self) -> None:
        bob = self.plain("bob")
        with mock.patch.object(chat, "prepare", side_effect=OSError(22, "Invalid argument")):  # as macOS says
            self.plain("eve").close()
        bob.until("eve left")
        self.eventually(lambda: self.connections() == 1, "its connection was left")

    @unittest.skipIf(sys.platform == "win32", "nobody tells there what the peer has acknowledged")
    def test_a_slow_peer_that_speaks_after_its_end_gets_the_last_line(self) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        sock.connect(("127.0.0.1", self.port))
        bob = Peer(self.port, "NICK bob\r\nUSER b 0 * :b\r\n", sock)
        self.addCleanup(bob.close)
        bob.until(" 376 ")
        with mock.patch.object(chat, "CLOSE_GRACE_S", 0.05):
            bob.send("".join(f"PING {number}{'x' * 400}\r\n" for number in range(300)) + "QUIT\r\n")
            self.eventually(lambda: self.counts()[0] == 0, "the QUIT was not read")
            for number in range(300):
                bob.until(f" PONG chat.local :{number}x")
                if number % 50 == 0:
                    time.sleep(0.1)  # longer than the grace, less than what is allowed without progress
                    bob.send("PONG x\r\n")
            self.assertEqual(bob.rest(), ["ERROR :Goodbye"])

    @unittest.skipUnless(sys.platform == "linux", "needs Linux, where what came before a reset can be read")
    def test_who_does_not_close_is_reset_and_has_the_last_line(self) -> None:
        bob = self.irc("bob")
        bob.send("QUIT\r\n")
        self.eventually(lambda: bob.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), "it was not reset")
        self.assertEqual(bob.rest()[-1], f"{ERROR}Goodbye")

    def test_shutdown_tells_everybody(self) -> None:
        ann, bot, eve = self.plain("ann"), self.peer('{"type":"join","user":"bot"}\n'), self.irc("eve")
        bot.until('"join"')
        self.server.stop()
        self.assertEqual(ann.rest()[-1], "*** Server is shutting down")
        self.assertEqual(json.loads(bot.rest()[-1])["text"], "*** Server is shutting down")
        self.assertEqual(eve.rest()[-1], f"{ERROR}Server is shutting down")

    def test_a_defect_ends_one_connection_only(self) -> None:
        ann, bob = self.plain("ann"), self.plain("bob")
        broken = chat.COMMANDS["NAMES"]._replace(run=mock.Mock(side_effect=ZeroDivisionError))
        with mock.patch.dict(chat.COMMANDS, NAMES=broken), self.logs(logging.ERROR):
            bob.send("/who\n")
            self.assertEqual(bob.rest(), [])
        ann.until("*** bob left (Internal error)")


class Throttled(ServerCase):
    """Limits for an address, and of what a client may send."""

    def test_connections_from_one_address_are_counted(self) -> None:
        self.limit(per_address=2)
        self.exempt("10.0.0.0/8")
        ann, bob = self.plain("ann"), self.plain("bob")
        for _ in range(3):
            with self.logs(logging.WARNING):
                self.assertEqual(self.peer().rest(), ["ERROR :Too many connections from your address"])
        bob.send("exit\n")
        bob.rest()
        bob.close()
        ann.until("bob left")
        self.eventually(lambda: self.connections() == 1, "bob's connection was left")
        self.plain("eve")

    def test_a_storm_from_one_address_is_kept_out(self) -> None:
        self.limit(per_address=2)
        self.exempt("")
        answers = []
        with self.logs(logging.WARNING):
            for _ in range(20):
                answers.append(self.peer("ann\nexit\n").rest()[-1])
                self.eventually(lambda: not self.connections(), "a connection was left")
        self.assertEqual(answers[:4], ["*** Goodbye"] * 4)
        self.assertIn("ERROR :Too many new connections from your address; wait a little", answers)
        later = time.monotonic() + chat.CONNECT_INTERVAL_S
        with mock.patch.object(time, "monotonic", lambda: later):
            self.plain("ann")

    @unittest.skipUnless(sys.platform == "linux", "needs Linux: 127.0.0.2 is another address")
    def test_who_connects_during_a_storm_does_not_wait_for_it(self) -> None:
        server = chat.Server("127.0.0.1", 0)
        server.hub.access = chat.AccessControl("127.0.0.2/32")
        storm = [socket.create_connection(server.address, PATIENCE) for _ in range(400)]
        for sock in storm:
            self.addCleanup(sock.close)
        ann = self.peer_from("127.0.0.2", server.address[1], "ann\n")
        with mock.patch.object(chat, "REJECT_PAUSE_S", 0.1), self.logs(logging.WARNING):
            began = time.monotonic()
            self.serve(server)
            ann.until("*** ann joined")
            self.assertLess(time.monotonic() - began, 10.0)  # after each of them it would be half a minute
        self.assertEqual(Peer(0, sock=storm[50]).rest(), ["ERROR :Too many connections from your address"])
        self.assertEqual(Peer(0, sock=storm[399]).rest(), [])

    def test_what_a_client_has_used_up_stays_so_on_the_next_connection(self) -> None:
        self.limit(burst=40, rate=10)
        self.exempt("")
        began = time.monotonic()
        bob = self.irc("bob")
        bob.send("PING x\r\n" * 35 + "QUIT\r\n")
        bob.rest()
        bob.close()
        self.eventually(lambda: not self.connections(), "bob is still connected")
        self.irc("eve")
        self.assertGreater(time.monotonic() - began, (4 + 36 + 4 - 40) / 10)
        indebted = chat.TokenBucket(10, 0.5)
        indebted.debit(100.0, 60)
        session = chat.Session("host", 100.0, None, (indebted, indebted))
        self.assertEqual(session.connected_at, 125.0)  # can register yet

    def test_an_exempt_address_is_one_address_or_a_network(self) -> None:
        access = chat.AccessControl("fe80::/10, 192.0.2.0/24, 2001:db8::5")
        for address, key, exempt in (
            ("2001:db8::5", "2001:db8::5", True), ("2001:db8:0:0::0005%eth0", "2001:db8::5", True),
            ("2001:db8::6", "2001:db8::/64", False), ("fe80::1", "fe80::1", True),
            ("::ffff:192.0.2.9", "192.0.2.9", True), ("::1", "::1", False),
        ):  # fmt: skip
            with self.subTest(address):
                self.assertEqual((access.address(address).key, access.address(address).exempt), (key, exempt))
        for _ in range(100):  # neither refused, nor at the expense of its neighbours
            self.assertEqual(access.address("2001:db8::5", 2).admit(2), "")
        admitted = [access.address("2001:db8::6", 2).admit(2) for _ in range(3)]
        self.assertEqual(admitted, ["", "", "Too many connections from your address"])
        self.assertFalse(chat.AccessControl("2001:db8::").address("2001:db8::1").exempt)

    def test_a_flood_is_slowed_and_nobody_else_notices(self) -> None:
        self.limit(burst=10, rate=50)
        self.exempt("")
        ann, bob = self.irc("ann"), self.irc("bob")
        bob.sync()
        began = time.monotonic()
        bob.send("".join(f"PRIVMSG #chat :{number}\r\n" for number in range(60)))
        ann.send("PRIVMSG #chat :in between\r\n")
        bob.until("in between")
        self.assertLess(time.monotonic() - began, 40 / 50)  # nor wait for lines of somebody else
        for number in range(60):
            self.assertIn(f"PRIVMSG #chat :{number}", ann.until("PRIVMSG #chat"))
        self.assertGreater(time.monotonic() - began, 45 / 50)  # no line may come before its time

    def test_what_others_receive_counts_as_lines(self) -> None:
        self.limit(burst=20, rate=100)
        self.exempt("")
        ann = self.irc("ann")
        names = ",".join(f"#{number}" for number in range(40))
        ann.send(f"JOIN {names}\r\n")
        ann.sync()
        began = time.monotonic()
        bob = self.irc("bob")
        bob.send(f"JOIN {names}\r\n")
        bob.sync()
        self.assertGreater(time.monotonic() - began, (39 + 5 - 20) / 100)
        self.assertEqual(sum(" JOIN " in line for line in ann.sync()), 41)

    def test_bytes_that_are_no_lines_are_slowed_as_well(self) -> None:
        self.limit(burst=10, rate=50)
        self.exempt("")
        bob = self.irc("bob")
        bob.sync()
        began = time.monotonic()
        bob.send("x" * 512 * 60)
        bob.send("\r\nPING end\r\n")
        bob.until("PONG chat.local :end")
        self.assertGreater(time.monotonic() - began, 45 / 50)

    def test_who_floods_on_and_on_is_dropped(self) -> None:
        self.limit(rate=20)
        self.exempt("")
        ann, bob = self.irc("ann"), self.irc("bob")
        limits = mock.patch.multiple(chat, FLOOD_S=0.3, CLOSE_GRACE_S=0.3, DROPPED_PAUSE_S=0)
        with limits, at_once(functools.partial(self.flood, bob)):
            self.assertEqual(ann.until(" QUIT "), ":bob!bob@localhost QUIT :Flooding")

    def flood(self, peer: Peer) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer.send("PRIVMSG #chat :and on\r\n" * 100)

    @unittest.skipUnless(hasattr(socket, "TCP_USER_TIMEOUT") and sys.platform == "linux", "needs Linux")
    def test_a_network_that_swallows_everything(self) -> None:
        self.limit(ping_s=1, pong_s=0.1)
        ann, bob = self.plain("ann"), self.plain("bob")
        drop_all = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF: accept 0 bytes of a packet
        bob.sock.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HP", 1, ctypes.addressof(drop_all)))  # SO_ATTACH_FILTER
        ann.send("hello?\n")
        ann.until("*** bob left (Connection lost)")
        self.eventually(lambda: self.counts()[0] == 1, "bob's name was not freed")


class Stress(ServerCase):
    """All that changes who gets what, at once, while messages flow: that holds also without a lock in the interpreter.

    The observer is in all channels all the time. From the events that it sees, in their order, follows what each of the
    others must have got, and in which order.
    """

    SECONDS, WORKERS, CHANNELS = 1.5, 5, ("#a", "#b")
    CAPS = "message-tags", "echo-message", "batch"
    ACTS = (
        *["PRIVMSG {0} :x"] * 5, *["JOIN {0}"] * 2, "PART {0}", "NICK {1}{2}", "CAP REQ :{3}extended-join",
        "CAP REQ :{3}server-time",
    )  # fmt: skip

    def test_everybody_gets_what_the_order_of_events_demands(self) -> None:
        names = [f"n{number}" for number in range(self.WORKERS)]
        with mock.patch.object(chat, "NICK_CHANGES", math.inf):
            observer, *workers = peers = [self.irc(name, *self.CAPS) for name in ("observer", *names)]
        observer.send("JOIN #a,#b\r\n")
        for peer in peers * 2:  # all get what the last one does
            peer.send("PART #chat\r\n")
            peer.sync()
            peer.seen.clear()
        acts = [functools.partial(self.act, peer, self.ACTS, [n]) for n, peer in enumerate(workers)]
        kicks = functools.partial(self.act, observer, ("KICK {0} {1}{2}", *["PING x"] * 9), range(self.WORKERS))
        with at_once(*acts, kicks, self.come_and_go):
            pass
        for peer in peers:
            peer.sync()
        seen, *streams = [[event for event in map(chat.parse, peer.seen) if "msgid" in event.tags] for peer in peers]
        ids = [int(event.tags["msgid"], 16) for event in seen]
        self.assertEqual(ids, sorted(ids))
        self.assertEqual({event.command for event in seen}, {"JOIN", "PART", "KICK", "NICK", "PRIVMSG", "QUIT"})
        wanted = self.demanded(seen)
        got = {
            name: [self.mark(event) for event in stream if (event.command, self.user(event)) != ("NICK", name)]
            for name, stream in zip(names, streams)
        }
        for name in names:
            self.assertEqual(got[name], wanted[name], name)
        self.compared = len(seen), sum(map(len, got.values()))

    def act(self, peer: Peer, acts: Sequence[str], numbers: Sequence[int]) -> None:
        end = time.monotonic() + self.SECONDS
        while time.monotonic() < end:
            for act in random.choices(acts, k=60):
                values = (random.choice(values) for values in (self.CHANNELS, "nm", numbers, "- "))
                peer.send(f"{act.format(*values)}\r\n")
            peer.sync()

    def come_and_go(self) -> None:
        end = time.monotonic() + self.SECONDS
        while time.monotonic() < end:
            guest = Peer(self.port, "NICK guest\r\nUSER guest 0 * :x\r\nJOIN #a,#b\r\nPRIVMSG #a :x\r\nQUIT\r\n")
            guest.rest()
            guest.close()

    def user(self, event: chat.Message) -> str:
        return event.source.partition("!")[2].partition("@")[0]

    def mark(self, event: chat.Message) -> str:
        return f"{'shown again: ' * ('batch' in event.tags)}{event.tags['msgid']}"

    def demanded(self, seen: list[chat.Message]) -> dict[str, list[str]]:
        """The marks of what each user must have got, but for its own new names."""
        wanted: dict[str, list[str]] = collections.defaultdict(list)
        members: dict[str, set[str]] = {channel: set() for channel in self.CHANNELS}
        said: dict[str, list[str]] = {channel: [] for channel in self.CHANNELS}
        users: dict[str, str] = {}  # by nick
        for event in seen:
            command, channel, user = event.command, event.param(0), self.user(event)
            users[channel if command == "NICK" else event.nick] = user
            if command == "JOIN":
                members[channel].add(user)
            places = [channel] if channel in members else [place for place in members if user in members[place]]
            for other in set().union(*(members[place] for place in places)):
                wanted[other] += [self.mark(event)] * ((command, other) != ("NICK", user))
            if command == "JOIN":
                wanted[user] += [f"shown again: {earlier}" for earlier in said[channel][-chat.REPLAY_LINES :]]
            elif command == "PRIVMSG":
                said[channel].append(self.mark(event))
            elif command != "NICK":
                for place in places:
                    members[place].discard(users[event.param(1)] if command == "KICK" else user)
        return wanted


class Passwords(ServerCase):
    def setUp(self) -> None:
        watch = self.logs(logging.DEBUG)  # until the server has stopped
        self.log = watch.__enter__()
        self.addCleanup(watch.__exit__, None, None, None)
        super().setUp()
        self.server.hub.access = chat.AccessControl(password="öpen sesame")
        patch = mock.patch.object(chat, "WRONG_PAUSE_S", 0.01)
        patch.start()
        self.addCleanup(patch.stop)

    def test_irc(self) -> None:
        ann = self.peer("CAP LS\r\nPASS :öpen sesame\r\nNICK ann\r\nUSER a 0 * :a\r\nCAP END\r\nJOIN #chat\r\n")
        ann.until(" 366 ")
        ann.send("PASS again\r\n")
        ann.until(" 462 ")
        for knock, why in (
            ("NICK ann\r\nUSER a 0 * :a\r\n", "a password is needed to join"),
            ("PASS sesame\r\nNICK ann\r\n", "that is not the password"),
        ):
            with self.subTest(knock):
                self.assertEqual(self.peer(knock).rest(), [f":chat.local 464 * :{why}", f"{ERROR}Wrong password"])
        self.assertEqual(ann.sync(), [])

    def test_a_person_is_asked(self) -> None:
        ann = self.peer("ann\n")
        ann.send("sesame\n")
        self.assertEqual(ann.line(), "Enter the password: *** Error: that is not the password")
        self.eventually(lambda: "WARNING wrong password from 127.0.0.1" in self.log, "it was not logged")
        ann.send("öpen sesame\n")
        self.assertEqual(ann.line(), "*** ann joined (1 here)")
        bob = self.peer("ann\nöpen sesame\n")
        self.assertEqual(bob.line(), "Enter the password: *** Error: that name is taken; choose another")
        bob.send("bob\nhello\n")
        ann.until("bob: hello")
        self.assertEqual(self.peer("eve\nexit\n").rest(), ["Enter the password: *** Goodbye"])

    def test_plain_lines_end_as_the_peers_do(self) -> None:
        for end in ("\n", "\r\n", "\r\0"):
            bob = self.peer(end.join(("bob", "wrong", "öpen sesame", "exit", "")))
            data = b"".join(iter(functools.partial(bob.sock.recv, 1000), b"")).decode()
            wrong = "Enter the password: *** Error: that is not the password"
            lines = [wrong, "*** bob joined (1 here)", "*** Goodbye", ""]
            self.assertEqual(data, end.replace("\0", "\n").join(lines))
            bob.close()

    def test_scripts(self) -> None:
        join = {"type": "join", "user": "bot"}
        bot = self.peer(json.dumps(join) + "\n")
        for password in ("sesame", "öpen sesame"):
            self.assertEqual(json.loads(bot.line() or "")["code"], "wrong-password")
            bot.send(json.dumps({**join, "password": password}) + "\n")
        self.assertEqual(json.loads(bot.line() or "")["event"], "join")

    def test_one_rule_for_all_dialects(self) -> None:
        self.server.hub.access = chat.AccessControl(password="\ufeffo\u0308pen sesame")
        for number, secret in enumerate(("öpen sesame", "o\u0308pen sesame", "\ufefföpen sesame")):
            with self.subTest(secret.encode()):
                irc = self.peer(f"PASS :{secret}\r\nNICK irc{number}\r\nUSER a 0 * :a\r\n")
                irc.until(" 001 ")
                person = self.peer(f"person{number}\n{secret}\n")
                person.until("joined")
                script = self.peer(json.dumps({"type": "join", "user": f"script{number}", "password": secret}) + "\n")
                self.assertEqual(json.loads(script.line() or "")["event"], "join")
        with mock.patch.object(unicodedata, "normalize", self.fail):  # which takes long, under the lock
            self.assertFalse(self.server.hub.access.check_password(chat.Address("192.0.2.1"), "\u0301" * 1000))

    def test_names_cannot_be_had_or_asked_for_without_it(self) -> None:
        ann = self.peer("PASS :öpen sesame\r\nNICK ann\r\nUSER a 0 * :a\r\n")
        ann.until(" 376 ")
        for knock in ("NICK ann", "NICK free", "USER x 0 * :x\r\nNICK ann"):
            self.assertIn(" 464 ", self.peer(f"{knock}\r\n").line() or "")
        for command in ("JOIN #chat", "LIST", "WHO ann", "PRIVMSG ann :x", "HELP"):
            self.assertIn(" 451 ", self.peer(f"CAP LS\r\n{command}\r\n").until(" 451 "))
        self.assertEqual(self.counts(ann)[0], 1)

    def test_a_thousand_wrong_ones(self) -> None:
        tried, right = 0, "PASS :öpen sesame\r\nNICK eve\r\nUSER e 0 * :e\r\n"
        opens = chat.AccessControl.check_password

        def counted(access: chat.AccessControl, address: chat.Address, password: str) -> bool:
            nonlocal tried
            tried += 1
            return opens(access, address, password)

        patient = mock.patch.object(chat, "WRONG_S", 600.0)  # none is forgiven, however long this takes
        with mock.patch.object(chat.AccessControl, "check_password", counted), patient:
            inside = self.peer("CAP LS\r\n")
            ends = [self.peer(f"PASS x{number}\r\nNICK eve\r\n").rest() for number in range(1000)]
            told = ["ERROR :Too many wrong passwords; try again later"]
            self.assertEqual([end for end in ends[5:] if end not in (told, [])], [])  # [] in a storm
            self.assertIn(told, ends[5:])
            self.assertEqual(tried, chat.WRONG_PASSWORDS)
            inside.send(right)  # even the right one: it might be a guess
            self.assertEqual(inside.rest()[-1], f"{ERROR}Too many wrong passwords; try again later")
        later = time.monotonic() + 600
        with mock.patch.object(time, "monotonic", lambda: later):
            self.peer(right).until(" 001 ")

    def test_a_wrong_one_is_followed_by_a_pause(self) -> None:
        with mock.patch.object(chat, "WRONG_PAUSE_S", 0.3):
            began = time.monotonic()
            ann = self.peer("ann\nx\ny\n")
            ann.line()
            ann.line()
            self.assertGreater(time.monotonic() - began, 0.3)


def make_certificate(path: str) -> None:
    """A certificate for this machine, with its key."""
    names = ["-subj", "/CN=chat.test", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", path, "-out", path]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    make = ["openssl", "req", "-x509", *kind, *names]
    subprocess.run(make, check=True, stderr=subprocess.DEVNULL, timeout=PATIENCE)


@unittest.skipUnless(ssl and shutil.which("openssl"), "needs openssl")
class TlsCase(Waiting):
    """One certificate for all tests of a class, and a peer with one thread."""

    folder: tempfile.TemporaryDirectory[str]

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        make_certificate(f"{cls.folder.name}/tls.pem")

    def server_context(self) -> ssl.SSLContext:
        return chat.server_context(f"{self.folder.name}/tls.pem", "")

    def receive(self, sock: chat.TlsSocket, size: int) -> bytes:
        """At least `size` bytes, or all up to the end, as a program with one thread receives."""
        data = b""
        while len(data) < size:
            try:
                piece = sock.recv(4096)
            except BlockingIOError:
                self.assertTrue(select.select([sock], [], [], PATIENCE)[0], "nothing comes")
                continue
            if not piece:
                break
            data += piece
        return data


class ByteByByte(socket.socket):
    """Sends and receives single bytes."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        return super().recv(1, flags)

    def send(self, data: Any, flags: int = 0) -> int:
        return super().send(data[:1], flags)

    def sendall(self, data: Any, flags: int = 0) -> None:
        for byte in data:
            super().sendall(bytes([byte]), flags)


class SlowStart(socket.socket):
    """Waits after the first bytes that it sends."""

    first = 0
    wait: Callable[[], object] = bool

    def sendall(self, data: Any, flags: int = 0) -> None:
        super().sendall(data[: self.first], flags)
        self.wait()
        self.wait = bool
        super().sendall(data[self.first :], flags)


class TlsSockets(TlsCase):
    """TlsSocket as a server and as a client, opposite another one or Python's own."""

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """Two connected sockets with little room."""
        with socket.create_server(("127.0.0.1", 0)) as listening:
            client = socket.create_connection(listening.getsockname(), PATIENCE)
            server, _ = listening.accept()
        for sock in (server, client):
            sock.settimeout(PATIENCE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, NARROW)
            self.addCleanup(sock.close)
        return server, client

    def unmet(self, pin: str = "") -> tuple[chat.TlsSocket, chat.TlsSocket]:
        """A server and a client before the handshake."""
        below = self.pair()
        server = chat.TlsSocket(below[0], self.server_context(), True)
        return server, chat.TlsSocket(below[1], chat.client_context(True), pin=pin)

    def ends(self) -> tuple[chat.TlsSocket, chat.TlsSocket]:
        """A server and a client after the handshake, non-blocking."""
        server, client = self.unmet()
        self.both(server.handshake, client.handshake)
        server.setblocking(False)
        client.setblocking(False)
        return server, client

    def both(self, *calls: Callable[[], object]) -> None:
        """Runs one call in a thread, the other one here."""
        with at_once(calls[0]):
            calls[1]()

    def test_much_both_ways_at_once(self) -> None:
        ends = self.ends()
        sizes = {ends[0]: 5_000_000, ends[1]: 3_000_000}
        texts = {sock: random.Random(size).getrandbits(8 * size).to_bytes(size, "big") for sock, size in sizes.items()}
        found: dict[chat.TlsSocket, bytes] = {}

        def send(sock: chat.TlsSocket) -> None:
            rest = memoryview(texts[sock])
            while rest:
                try:
                    rest = rest[sock.send(bytes(rest[:200_000]), 0) :]
                except BlockingIOError:
                    select.select([], [sock], [], PATIENCE)

        def receive(sock: chat.TlsSocket, other: chat.TlsSocket) -> None:
            found[sock] = self.receive(sock, sizes[other])

        pairs = (ends, ends[::-1])
        with at_once(
            *(functools.partial(send, sock) for sock in ends), *(functools.partial(receive, *p) for p in pairs)
        ):
            pass
        for sock, other in pairs:
            self.assertTrue(found.get(sock) == texts[other], "it is not the same")

    def test_it_talks_with_another_tls(self) -> None:
        below = self.pair()
        other: list[ssl.SSLSocket] = []
        sock = chat.TlsSocket(below[0], self.server_context(), True)
        self.both(sock.handshake, lambda: other.append(chat.client_context(True).wrap_socket(below[1])))
        self.addCleanup(other[0].close)
        other[0].sendall(b"there")
        self.assertEqual(self.receive(sock, 5), b"there")
        sock.send(b"and back")
        self.assertEqual(other[0].recv(100), b"and back")
        self.both(lambda: sock.shutdown(socket.SHUT_WR), lambda: self.assertEqual(other[0].recv(100), b""))
        other[0].sendall(b"still")
        self.assertEqual(self.receive(sock, 5), b"still")
        self.assertRaises(OSError, sock.send, b"in clear text")
        other[0].unwrap()
        self.assertEqual(self.receive(sock, 5), b"")

    def test_text_that_comes_with_the_end_of_the_handshake(self) -> None:
        server, client = self.unmet()
        for sock in (client, server):
            sock.setblocking(False)
            self.assertRaises(BlockingIOError, sock.handshake)
        client.handshake()
        client.send(b"ann")
        server.handshake()
        self.assertEqual(self.receive(server, 3), b"ann")

    def test_what_is_no_text_does_not_keep_a_reader(self) -> None:
        server, client = self.ends()
        server.settimeout(PATIENCE)
        client.send(b"cut in two")
        self.assertRaises(BlockingIOError, server.recv, 20)
        self.assertEqual(server.recv(100), b"cut in two")

    def test_a_cut_is_no_end(self) -> None:
        for ends_well in (False, True):
            with self.subTest(ends_well):
                server, client = self.ends()
                self.assertRaises(BlockingIOError, client.recv, 4096)  # session tickets; unread, they make a reset
                client.send(b"last")
                if ends_well:
                    client.shutdown(socket.SHUT_WR)
                client.close()
                self.assertEqual(self.receive(server, 4), b"last")
                if ends_well:
                    self.assertEqual(self.receive(server, 1), b"")
                else:
                    self.assertRaisesRegex(ConnectionError, "cut", self.receive, server, 1)

    def test_an_end_for_which_there_is_no_room_is_told_later(self) -> None:
        server, client = self.ends()
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += server.send(b"x" * 1000)
        server.shutdown(socket.SHUT_WR)
        got = self.receive(client, sent)
        server.shutdown(socket.SHUT_RDWR)
        self.assertEqual(set(got + self.receive(client, 2000)), set(b"x"))
        self.assertEqual(client.recv(100), b"")

    def test_nothing_goes_before_the_handshake(self) -> None:
        below, other = self.pair()
        sock = chat.TlsSocket(below, self.server_context(), True)
        self.assertRaises(OSError, sock.send, b"secret")
        self.assertRaises(OSError, sock.recv, 100)
        sock.shutdown(socket.SHUT_WR)
        self.assertEqual(other.recv(100), b"")

    def test_why_there_is_no_handshake(self) -> None:
        for answer, error, text in (
            (b"ERROR :full\r\n", ConnectionError, "^full$"),
            (b"", ConnectionError, "ended the connection; perhaps it does not speak TLS"),
            (b"*** hello\r\n", ssl.SSLError, "(?i)wrong.version"),
        ):
            with self.subTest(answer):
                other, below = self.pair()
                other.sendall(answer)
                other.shutdown(socket.SHUT_WR)
                client = chat.TlsSocket(below, chat.client_context(True))
                self.assertRaisesRegex(error, text, client.handshake)
                self.assertRaises(OSError, client.send, b"secret")

    def test_nothing_goes_to_who_has_not_the_pin(self) -> None:
        server, client = self.unmet("00")

        def find_out() -> None:
            self.assertRaisesRegex(chat.UntrustedPeer, "its fingerprint is .*, not 00", client.handshake)
            self.assertRaises(OSError, client.send, b"secret")
            client.close()

        self.both(find_out, lambda: self.assertRaises(OSError, server.handshake))


class Encrypted(ServerCase, TlsCase):
    """TLS and clear text on one port."""

    def setUp(self) -> None:
        self.start(False)

    def start(self, tls_only: bool) -> None:
        self.serve(chat.Server("127.0.0.1", 0, None, self.server_context(), tls_only))

    def secret(self, data: str = "") -> Peer:
        """A peer that speaks TLS."""
        sock = chat.client_context(True).wrap_socket(socket.create_connection(("127.0.0.1", self.port), PATIENCE))
        peer = Peer(self.port, data, sock)
        self.addCleanup(peer.close)
        return peer

    def tls(self, sock: socket.socket) -> chat.TlsSocket:
        """Our own kind of TLS over a new socket, before the handshake."""
        sock.connect(("127.0.0.1", self.port))
        sock.settimeout(PATIENCE)
        tls = chat.TlsSocket(sock, chat.client_context(True))
        self.addCleanup(tls.close)
        return tls

    def test_all_dialects_meet_those_in_clear_text(self) -> None:
        ann = self.plain("ann")
        bob = self.secret("bob\n")
        bob.until("bob joined")
        eve = self.secret("NICK eve\r\nUSER eve 0 * :eve\r\nJOIN #chat\r\n")
        eve.until(" 366 ")
        bot = self.secret('{"type":"join","user":"bot"}\n')
        bot.until("bot joined")
        for sender, name, line in (
            (ann, "ann", "hello é\n"), (bob, "bob", "hello é\n"), (eve, "eve", "PRIVMSG #chat :hello é\r\n"),
            (bot, "bot", '{"type":"chat","text":"hello é"}\n'),
        ):  # fmt: skip
            sender.send(line)
            for receiver in {ann, bob, eve, bot} - {sender}:
                receiver.until({eve: ":hello é", bot: "hello \\u00e9"}.get(receiver, f"{name}: hello é"))
        bob.send("exit\n")
        self.assertEqual(bob.rest()[-1], "*** Goodbye")

    def test_whatever_way_the_bytes_are_cut(self) -> None:
        tls = self.tls(ByteByByte())
        tls.handshake()
        tls.send(b"ann\nexit\n")
        self.assertEqual(self.receive(tls, 1000), b"*** ann joined (1 here)\n*** Goodbye\n")

    def test_a_prompt_waits_for_the_handshake(self) -> None:
        for tls_only, first in ((True, 0), (True, 1), (False, 1)):
            with self.subTest(tls_only=tls_only, first=first):
                self.start(tls_only)
                sock = SlowStart()
                tls = self.tls(sock)
                (session,) = self.sessions(1)
                with self.server.hub:
                    self.assertEqual(session.deadline, session.connected_at + chat.TLS_PROMPT_S)

                def outlast_the_prompt(session: chat.Session = session) -> None:
                    self.eventually(lambda: session.stage is chat.Stage.HANDSHAKING, "nobody sees that it is TLS")
                    with self.server.hub as hub:
                        hub.set_deadline(session, 0.0)
                    self.eventually(lambda: session.deadline > 0, "nobody looks whether it should be prompted")

                sock.first, sock.wait = first, outlast_the_prompt
                with mock.patch.object(chat, "PROMPT_S", 0.05):
                    tls.handshake()
                    self.assertEqual(self.receive(tls, 17), b"Enter your name: ")

    def sessions(self, count: int) -> list[chat.Session]:
        self.eventually(lambda: len(self.server.hub.sessions) == count, "not all are there")
        return list(self.server.hub.sessions)

    def test_clear_text_where_only_tls_is_wanted(self) -> None:
        self.start(True)
        self.secret("bob\n").until("bob joined")
        for line, answer in (
            ("ann\n", f"*** {chat.TLS_ONLY}"), ("NICK ann\r\n", f"{ERROR}{chat.TLS_ONLY}"),
            ("GET / HTTP/1.1\r\nHost: [::1]:9\r\n\r\n", "Location: https://[::1]:9/"),
            ("PASS x HTTP/1.1\r\n\r\n", "HTTP/1.1 400 "), ("ann \r\0 HTTP/1.1\r\n\r\n", chat.TLS_ONLY),
            (WebRequests.UPGRADE.format("/", ""), "Location: https://localhost/"),
        ):  # fmt: skip
            self.assertIn(answer, "\n".join(self.peer(line).rest()))

    def test_browsers_by_tls(self) -> None:
        self.start(True)
        page = self.secret("GET / HTTP/1.1\r\nHost: any.example:9\r\n\r\n")  # no other name has our certificate
        self.assertEqual(page.line(), "HTTP/1.1 200 OK")
        self.assertEqual(page.rest()[-1], "</html>")
        bob, ann = self.secret("bob\n"), WebPeer(self.port, sock=self.secret().sock)
        ann.say({"type": "join", "user": "ann"})
        bob.until("ann joined")
        bob.send("x" * 400 + "\n")
        self.assertEqual(ann.json("chat")["text"], "x" * 400)
        ann.say({"type": "leave"})
        self.assertIn("Goodbye", ann.rest()[-1])
        self.assertEqual(ann.code, 1000)

    def test_a_hundred_handshakes_that_never_end(self) -> None:
        ann = self.secret("ann\n")
        ann.until("ann joined")
        before = threading.active_count()
        self.limit(register_s=0.5)
        silent = [self.peer("\x16\x03\x01") for _ in range(100)]
        for peer in silent:
            self.assertEqual(peer.rest(), [])
            peer.close()
        self.eventually(lambda: self.connections() == 1, "connections were left")
        self.eventually(lambda: threading.active_count() <= before, "threads were left")
        ann.send("/who\n")
        ann.until("In #chat: @ann")

    def test_nothing_in_clear_text_to_who_says_nothing(self) -> None:
        self.start(True)
        self.limit(register_s=0.2)
        self.assertEqual(self.peer().rest(), [])
        self.limit(register_s=PATIENCE)
        late = self.peer()
        self.sessions(1)
        self.server.stop()
        self.assertEqual(late.rest(), [])

    def test_a_peer_that_goes_on_to_talk_is_told_that_it_is_over(self) -> None:
        with mock.patch.multiple(chat, CLOSE_GRACE_S=PATIENCE, DROPPED_PAUSE_S=0):
            for talk in (False, True):
                tls = self.tls(socket.socket())
                tls.handshake()
                tls.send(b"ann\nexit\n")
                self.eventually(lambda: not self.server.hub.sessions, "ann has not gone")
                for _ in range(200 if talk else 0):  # more than sockets hold
                    rest = b"x" * 50_000
                    while rest:
                        with contextlib.suppress(BlockingIOError):
                            rest = rest[tls.send(rest) :]
                            continue
                        self.assertTrue(select.select([], [tls], [], PATIENCE)[1], "nobody reads that")
                self.assertEqual(self.receive(tls, 1000), b"*** ann joined (1 here)\n*** Goodbye\n")
                tls.close()
                self.eventually(lambda: not self.connections(), "it is not closed")

    def test_what_is_cut_off_does_not_count(self) -> None:
        ann = self.plain("ann")
        for ends_well in (False, True):
            name = "bob" if ends_well else "eve"
            peer = self.secret(f"{name}\n")
            peer.until("joined")
            peer.send("do not")
            assert isinstance(peer.sock, ssl.SSLSocket)
            if ends_well:
                with contextlib.suppress(OSError):
                    peer.sock.unwrap()
            peer.sock.close()
        said = [line for line in (ann.until("bob left") and ann.seen) if "do not" in line]
        self.assertEqual(said, ["bob: do not"])

    def test_garbage_ends_one_connection_only(self) -> None:
        bob = self.secret("bob\n")
        bob.until("bob joined")
        raw = [self.peer(data) for data in ("\x16garbage" * 100, "\x16\x03\x01\x00\x05hello")]
        broken = self.secret("eve\n")
        broken.until("eve joined")
        with socket.fromfd(broken.sock.fileno(), socket.AF_INET, socket.SOCK_STREAM) as below:
            below.sendall(b"in clear text now" * 10)
        for peer in raw:
            peer.rest()
        bob.until("*** eve left (Connection lost)")

    def test_a_slow_reader_gets_everything_in_order(self) -> None:
        self.read_slowly(self.secret)

    def test_many_talk_at_once(self) -> None:
        self.talk_at_once(self.secret, 200)


class PastCase(ServerCase):
    """History as IRC clients, plain users and scripts get it."""

    CAPS: tuple[str, ...] = (
        "batch", "draft/chathistory", "echo-message", "message-tags", "server-time", "labeled-response",
        "standard-replies", "draft/message-redaction",
    )  # fmt: skip

    def talk(self, count: int) -> tuple[Peer, list[Message]]:
        """ann, who has said `count` lines, and their echoes."""
        ann = self.irc("ann", *self.CAPS)
        for number in range(count):
            ann.send(f"PRIVMSG #chat :line {number}\r\n")
        return ann, [chat.parse(ann.until(" PRIVMSG ")) for _ in range(count)]

    def ask(self, peer: Peer, command: str, *batch: str) -> list[Message]:
        """The messages of the batch that answers a command."""
        peer.send(f"{command}\r\n")
        lines = [chat.parse(line) for line in peer.sync()]
        first, *inside, last = lines
        self.assertEqual((first.command, last.params), ("BATCH", (f"-{first.param(0)[1:]}",)))
        self.assertEqual({message.tags["batch"] for message in inside} - {first.param(0)[1:]}, set())
        self.assertEqual(first.params[1:], batch or ("chathistory", "#chat"))
        return inside


class Past(PastCase):
    """CHATHISTORY."""

    def test_chathistory(self) -> None:
        ann, said = self.talk(10)
        ids = [f"msgid={message.tags['msgid']}" for message in said]
        for command, lines in (
            ("LATEST #chat * 3", [7, 8, 9]), ("LATEST #CHAT * 500", range(10)), ("latest #chat * 0", []),
            (f"LATEST #chat {ids[7]} 9", [8, 9]), (f"BEFORE #chat {ids[5]} 2", [3, 4]),
            (f"BEFORE #chat {ids[0]} 2", []), (f"AFTER #chat {ids[5]} 2", [6, 7]), (f"AFTER #chat {ids[9]} 2", []),
            ("AFTER #chat timestamp=2001-01-01T00:00:00.000Z 2", [0, 1]),
            ("BEFORE #chat timestamp=2001-01-01T00:00:00.000Z 2", []), (f"AROUND #chat {ids[5]} 4", [3, 4, 5, 6]),
            (f"AROUND #chat {ids[5]} 1", [5]), (f"BETWEEN #chat {ids[2]} {ids[8]} 3", [3, 4, 5]),
            (f"BETWEEN #chat {ids[8]} {ids[2]} 3", [5, 6, 7]), (f"BETWEEN #chat {ids[2]} {ids[4]} 9", [3]),
        ):  # fmt: skip
            with self.subTest(command):
                answer = self.ask(ann, f"CHATHISTORY {command}")
                self.assertEqual([message.text for message in answer], [f"line {number}" for number in lines])
                for message in answer:
                    expected = said[int(message.text[5:])]
                    tags = {key: value for key, value in message.tags.items() if key != "batch"}
                    self.assertEqual((tags, message.source), (expected.tags, expected.source))

    def test_a_time_means_that_of_the_line(self) -> None:
        """Also after the clock was set back, when numbers are ahead of it."""
        now = (int(time.time()) - 10) * 1_000_000
        for number, (ahead, own) in enumerate(((0, 0), (1, -3600), (2, -1800), (3, 0)), 1):
            stamp = {"time": chat.server_time(now / 1e6 + own), "msgid": f"{now + ahead * 1_000_000:x}"}
            message = Message("PRIVMSG", ("#chat", f"line {number}"), "bob!bob@host", stamp)
            self.server.hub.history.append([("#chat", message)])
        ann = self.irc("ann", *self.CAPS)
        at = {minutes: f"timestamp={chat.server_time(now / 1e6 - minutes * 60)}" for minutes in (90, 45, 10, 0)}
        for command, lines in (
            (f"AFTER #chat {at[10]} 9", [1, 4]), (f"AFTER #chat {at[45]} 9", [1, 3, 4]),
            (f"AFTER #chat {at[45]} 2", [1, 3]), (f"AFTER #chat {at[90]} 9", [1, 2, 3, 4]),
            (f"LATEST #chat {at[10]} 9", [1, 4]), (f"AROUND #chat {at[0]} 4", [1, 4]),
            (f"BETWEEN #chat {at[10]} timestamp=2100-01-01T00:00:00.000Z 9", [1, 4]),
            (f"AFTER #chat msgid={now:x} 9", [2, 3, 4]),
        ):  # fmt: skip
            with self.subTest(command):
                answer = self.ask(ann, f"CHATHISTORY {command}")
                self.assertEqual([message.text for message in answer], [f"line {number}" for number in lines])

    def test_nobody_wipes_what_was_said_by_opening_channels(self) -> None:
        self.talk(1)
        eve = self.irc("eve")
        with mock.patch.object(chat, "MEMORY_TOTAL", 20, create=True):
            for number in range(60):
                eve.send(f"JOIN #{number}\r\nPRIVMSG #{number} :x\r\nPART #{number}\r\n")
            eve.sync()
        self.plain("bob").until("ann: line 0")

    def test_errors(self) -> None:
        ann, _ = self.talk(1)
        self.irc("bob").send("JOIN #other\r\n")
        ann.until("JOIN")
        for command, error in (
            ("", "461 ann CHATHISTORY :CHATHISTORY needs more than that"),
            ("NEXT #chat * 1", "FAIL CHATHISTORY UNKNOWN_COMMAND NEXT :"),
            ("LATEST #chat", "FAIL CHATHISTORY INVALID_PARAMS LATEST :"),
            ("LATEST #chat *", "FAIL CHATHISTORY INVALID_PARAMS LATEST :"),
            ("LATEST #chat * many", "FAIL CHATHISTORY INVALID_PARAMS LATEST :"),
            ("LATEST #chat * -1", "FAIL CHATHISTORY INVALID_PARAMS LATEST :"),
            ("BEFORE #chat * 1", "FAIL CHATHISTORY INVALID_PARAMS BEFORE :"),
            ("BETWEEN #chat msgid=1 1", "FAIL CHATHISTORY INVALID_PARAMS BETWEEN :"),
            ("AFTER #chat msgid=zz 1", "FAIL CHATHISTORY INVALID_PARAMS AFTER :"),
            ("LATEST #other * 1", "FAIL CHATHISTORY INVALID_TARGET LATEST #other :"),
            ("LATEST #nowhere * 1", "FAIL CHATHISTORY INVALID_TARGET LATEST #nowhere :"),
            ("LATEST @ann * 1", "FAIL CHATHISTORY INVALID_TARGET LATEST @ann :"),
        ):
            self.answers(ann, [(f"CHATHISTORY {command}", [f":chat.local {error}"])])
        for cap in ("draft/chathistory", "draft/message-redaction"):  # who knows one, knows how it tells of errors
            peer = self.irc(cap[6:10], cap)
            peer.sync()
            self.answers(peer, [("CHATHISTORY NEXT x", ["FAIL CHATHISTORY UNKNOWN_COMMAND NEXT :"])])

    def test_what_was_asked_before_leaving_is_answered(self) -> None:
        ann, _ = self.talk(1)
        ann.send("CHATHISTORY LATEST #chat * 1\r\nQUIT\r\n")
        self.assertEqual([chat.parse(line).command for line in ann.rest()], ["BATCH", "PRIVMSG", "BATCH", "ERROR"])

    def test_targets(self) -> None:
        ann, said = self.talk(1)
        ann.send("JOIN #quiet\r\n")
        ann.sync()
        for span, found in (
            ("1970-01-01 2100-01-01", ["#chat"]), ("2100-01-01 1970-01-01", ["#chat"]), ("1970-01-01 1971-01-01", []),
        ):  # fmt: skip
            first, second = (f"timestamp={day}T00:00:00.000Z" for day in span.split())
            ann.send(f"CHATHISTORY TARGETS {first} {second} 5\r\n")
            start, *lines, _ = [chat.parse(line) for line in ann.sync()]
            self.assertEqual(start.params[1:], ("draft/chathistory-targets",))
            self.assertEqual(
                [line.params for line in lines], [("TARGETS", name, said[0].tags["time"]) for name in found]
            )


class PastPrivate(PastCase):
    """What two have said to each other alone, which nobody else can ask for."""

    def say(self, peer: Peer, to: str, text: str) -> Message:
        """Says something to one person, or in a channel; returns its echo."""
        peer.send(f"PRIVMSG {to} :{text}\r\n")
        return chat.parse(peer.until(f" :{text}"))

    def texts(self, peer: Peer, who: str, what: str = "LATEST {} * 9") -> list[str]:
        found = self.ask(peer, f"CHATHISTORY {what.format(who)}", "chathistory", who)
        return [message.text for message in found]

    def targets(self, peer: Peer, span: str = "1970-01-01 2100-01-01", most: int = 9) -> list[str]:
        days = " ".join(f"timestamp={day}T00:00:00.000Z" for day in span.split())
        found = self.ask(peer, f"CHATHISTORY TARGETS {days} {most}", "draft/chathistory-targets")
        return [" ".join(message.params[1:]) for message in found]

    def test_both_read_it_and_nobody_else(self) -> None:
        ann, bob, eve = (self.irc(name, *self.CAPS) for name in ("ann", "bob", "eve"))
        said = [self.say(*words) for words in ((ann, "bob", "one"), (bob, "ann", "two"), (ann, "BOB", "three"))]
        ann.send("TAGMSG bob\r\nNOTICE bob :four\r\nPRIVMSG #chat :all\r\n")
        ann.until("#chat :all")
        self.say(ann, "eve", "apart")
        ids = [f"msgid={message.tags['msgid']}" for message in said]
        for peer, who in ((ann, "bob"), (bob, "ann"), (bob, "ANN")):
            peer.sync()
            for what, wanted in (
                ("LATEST {} * 9", "one two three four"), ("LATEST {} * 2", "three four"),
                (f"BEFORE {{}} {ids[2]} 9", "one two"), (f"AFTER {{}} {ids[0]} 1", "two"),
                (f"AROUND {{}} {ids[1]} 3", "one two three"), (f"BETWEEN {{}} {ids[2]} {ids[0]} 9", "two"),
            ):  # fmt: skip
                with self.subTest(what, who=who):
                    self.assertEqual(self.texts(peer, who, what), wanted.split())
            found = self.ask(peer, f"CHATHISTORY LATEST {who} * 9", "chathistory", who)
            expected = [{**message.tags, "batch": found[0].tags["batch"]} for message in said]
            self.assertEqual([message.tags for message in found[:3]], expected)
            self.assertEqual(found[1].params, ("ann", "two"))
        eve.sync()
        for who, texts in (("ann", ["apart"]), ("bob", []), ("eve", []), ("nobody", [])):
            self.assertEqual(self.texts(eve, who), texts)

    def test_messages_to_oneself(self) -> None:
        ann = self.irc("ann", *self.CAPS)
        ann.send("PRIVMSG ann :note\r\n")
        ann.sync()
        self.assertEqual(self.texts(ann, "ann"), ["note"])

    def test_who_takes_a_name_later_reads_nothing(self) -> None:
        ann, bob = self.two(*self.CAPS)
        time = self.say(ann, "bob", "psst").tags["time"]
        bob.send("QUIT\r\n")
        bob.rest()
        ann.until("QUIT")
        self.assertEqual((self.texts(ann, "bob"), self.targets(ann)), (["psst"], [f"bob {time}"]))  # still hers
        other = self.irc("bob", *self.CAPS)
        ann.sync()
        self.assertEqual((self.texts(other, "ann"), self.targets(other), self.texts(ann, "bob")), ([], [], []))
        self.say(ann, "bob", "welcome")
        ann.send("NICK ann2\r\n")
        ann.sync()
        other.sync()
        for who in ("ann2", "ann"):  # the name of now, and that of then
            self.assertEqual(self.texts(other, who), ["welcome"])

    def test_a_token_makes_one_the_same_again(self) -> None:
        ann, bob = self.irc("ann", *self.CAPS), self.irc("bob", *self.CAPS, token="bob" * 6)
        self.say(ann, "bob", "psst")
        bob.send("QUIT\r\n")
        bob.rest()
        ann.until("QUIT")
        again = self.irc("rob", *self.CAPS, token="bob" * 6)
        ann.sync()
        self.assertEqual((self.texts(again, "ann"), self.texts(ann, "rob")), (["psst"], ["psst"]))

    def test_targets_in_order_and_the_nearest_first(self) -> None:
        ann, bob = self.two(*self.CAPS)
        self.irc("cat")
        ann.sync()
        said = [self.say(ann, to, "hi") for to in ("cat", "bob", "#chat", "cat")]
        expected = [f"{message.params[0]} {message.tags['time']}" for message in said[1:]]
        ann.sync()
        for span, most, found in (
            ("1970-01-01 2100-01-01", 9, expected), ("2100-01-01 1970-01-01", 9, expected),
            ("1970-01-01 2100-01-01", 2, expected[:2]), ("2100-01-01 1970-01-01", 2, expected[1:]),
            ("2100-01-01 1970-01-01", 0, []), ("1970-01-01 1971-01-01", 9, []),
        ):  # fmt: skip
            self.assertEqual(self.targets(ann, span, most), found)

    def test_it_is_bounded_like_a_channel(self) -> None:
        ann, bob = self.two(*self.CAPS)
        with mock.patch.object(chat, "MEMORY_LINES", 3):
            for number in range(5):
                self.say(ann, "bob", f"line {number}")
        self.assertEqual(self.texts(ann, "bob"), ["line 2", "line 3", "line 4"])

    def test_only_its_author_removes_a_message(self) -> None:
        """Both are told, and a script asks in its own way."""
        ann, bob = self.two(*self.CAPS)
        msgid, _ = (self.say(ann, "bob", text).tags["msgid"] for text in ("a slip", "fine"))
        bob.sync()
        bob.send(f"REDACT ann {msgid}\r\n")
        self.assertIn(f"FAIL REDACT REDACT_FORBIDDEN ann {msgid} :", bob.sync()[0])
        ann.send(f"REDACT bob {msgid} :sorry\r\n")
        for peer in (ann, bob):
            self.assertTrue(peer.until("REDACT").endswith(f" :ann!ann@localhost REDACT bob {msgid} :sorry"))
        self.assertEqual(self.texts(bob, "ann"), ["fine"])
        script = self.peer('{"type":"join","user":"cat","replay":false}\n{"type":"private","to":"bob","text":"x"}\n')
        bob.until(" :x")
        script.send('{"type":"history","channel":"bob"}\n')
        item = json.loads(script.until('"replayed"'))
        self.assertEqual((item["type"], item["to"], item["text"]), ("private", "bob", "x"))


class PastUnasked(PastCase):
    """What newcomers get of the history without asking, and labels on what was asked."""

    def test_newcomers_are_told(self) -> None:
        ann, said = self.talk(chat.REPLAY_LINES + 5)
        minute = said[-1].tags["time"].replace("T", " ")[:16]
        texts = [f"line {number}" for number in range(5, chat.REPLAY_LINES + 5)]
        bob = self.plain("bob")
        bob.send("/who\n")
        bob.until("*** In #chat")
        self.assertEqual(
            bob.seen[1:-1],
            [f"*** Said here before, since {said[5].tags['time'].replace('T', ' ')[:16]} UTC:"]
            + [f"ann: {text}" for text in texts]
            + [f"*** End of what was said before; the last was at {minute} UTC"],
        )
        cat = self.irc("cat", "server-time")
        lines = cat.sync()
        self.assertTrue(lines[0].startswith(":chat.local NOTICE #chat :Said here before, since "))
        self.assertIn(f"@time={said[5].tags['time']} :ann!ann@localhost PRIVMSG #chat :line 5", lines[1])
        self.assertEqual(len(lines), chat.REPLAY_LINES + 2)
        self.assertEqual(self.irc("dan", *self.CAPS).sync(), [])
        script = self.peer('{"type":"join","user":"bot"}\n')
        script.until('"event": "join"')
        script.until("Said here before")
        item = json.loads(script.line() or "")
        self.assertEqual((item["text"], item["id"], item["replayed"]), ("line 5", said[5].tags["msgid"], True))

    def test_what_is_relayed_because_of_a_join_stands_in_one_batch(self) -> None:
        _, said = self.talk(2)
        for caps in (("batch",), ("batch", "server-time", "message-tags"), ("batch", "labeled-response")):
            with self.subTest(caps):
                bob = self.irc("bob", *caps)
                first, *inside, last = map(chat.parse, bob.sync())
                batch = first.param(0)[1:]
                self.assertEqual((first.command, first.params[1:]), ("BATCH", ("chathistory", "#chat")))
                self.assertEqual((last.command, last.params), ("BATCH", (f"-{batch}",)))
                self.assertEqual([line.text for line in inside[1:-1]], [item.text for item in said])
                self.assertEqual([line.tags["batch"] for line in inside], [batch] * 4)
                bob.send("QUIT\r\n")
                bob.rest()
        bob = self.peer(
            "CAP REQ :batch labeled-response\r\nNICK bob\r\nUSER b 0 * :b\r\nCAP END\r\n@label=L JOIN #chat\r\n"
        )
        whole = chat.parse(bob.until("BATCH +"))
        inner = chat.parse(bob.until(" chathistory "))
        self.assertEqual((whole.tags["label"], inner.tags["batch"]), ("L", whole.param(0)[1:]))
        self.assertEqual(chat.parse(bob.until(" PRIVMSG ")).tags["batch"], inner.param(0)[1:])

    def test_labels(self) -> None:
        ann, _ = self.talk(2)
        for command, answer in (
            ("PONG x", "@label=L :chat.local ACK"), ("PING x", "@label=L :chat.local PONG chat.local :x"),
            ("DANCE", "@label=L :chat.local 421 ann DANCE :DANCE is not a command here"),
            ("PRIVMSG #chat hi", "@time=T;msgid=M;label=L :ann!ann@localhost PRIVMSG #chat :hi"),
            ("PRIVMSG nobody hi", "@label=L :chat.local 401 ann nobody :nobody here is called nobody"),
            ("TOPIC #chat", "@label=L :chat.local 331 ann #chat :No topic is set"),
        ):  # fmt: skip
            with self.subTest(command):
                ann.send(f"@label=L {command}\r\n")
                lines = [re.sub("time=[^;]*;msgid=[0-9a-f]+", "time=T;msgid=M", line) for line in ann.sync()]
                self.assertEqual(lines, [answer])
        for command, kind in (("WHOIS ann", "labeled-response"), ("CHATHISTORY LATEST #chat * 9", "chathistory")):
            ann.send(f"@label=L {command}\r\n")
            first, *inside, last = [chat.parse(line) for line in ann.sync()]
            self.assertEqual((first.tags, first.param(1), last.command), ({"label": "L"}, kind, "BATCH"))
            self.assertEqual({message.tags.get("batch") for message in inside}, {first.param(0)[1:]})
        ann.send("@label=" + "x" * 65 + " PING x\r\n")
        self.assertNotIn("label", ann.sync()[0])


class Redacted(PastCase):
    """REDACT, as those see it who know it, and others."""

    def two_lines(self) -> tuple[Peer, Peer, list[str]]:
        """ann, who is operator, and bob; and the msgids of what each has said."""
        ann, bob = self.two(*self.CAPS)
        ids = []
        for peer in (ann, bob):
            peer.send("PRIVMSG #chat :a slip\r\n")
            ids.append(chat.parse(peer.until("a slip")).tags["msgid"])
            (bob if peer is ann else ann).until("a slip")
        return ann, bob, ids

    @staticmethod
    def bare(lines: list[str]) -> list[str]:
        return [re.sub(r"^@\S+ ", "", line) for line in lines]

    def removed(self, who: str, msgid: str, *peers: Peer, reason: str = "") -> None:
        """All, the first of whom has done so, are told that a message was removed, and nothing else."""
        line = f":{who}!{who}@localhost REDACT #chat " + (f"{msgid} :{reason}" if reason else f":{msgid}")
        for peer in peers:
            self.assertEqual(self.bare(peer.sync()), [line])

    def test_authors_remove_their_own_and_operators_any(self) -> None:
        ann, bob, (hers, his) = self.two_lines()
        for peer, msgid, error in (
            (bob, hers, "REDACT_FORBIDDEN #CHAT"), (bob, "1f", "UNKNOWN_MSGID #CHAT"),
            (bob, "xyz", "UNKNOWN_MSGID #CHAT"), (bob, "*", ""), (bob, his, "UNKNOWN_MSGID #CHAT"),
            (ann, hers, ""), (ann, "*", "UNKNOWN_MSGID #CHAT"),
        ):  # fmt: skip
            with self.subTest(error):
                peer.send(f"REDACT #CHAT {msgid} :sorry\r\n")
                if error:
                    wanted = error.replace("#CHAT", f"#chat {hers if msgid == '*' else msgid} :")
                    self.assertIn(f"FAIL REDACT {wanted}", peer.sync()[0])
                else:
                    who, removed = ("bob", his) if peer is bob else ("ann", hers)
                    self.removed(who, removed, peer, bob if peer is ann else ann, reason="sorry")
        self.assertEqual(self.ask(bob, "CHATHISTORY LATEST #chat * 9"), [])
        bob.send("PRIVMSG #chat :spam\r\n")
        msgid = chat.parse(ann.until("spam")).tags["msgid"]
        ann.send(f"REDACT #chat {msgid}{msgid}\r\n")
        self.assertIn("UNKNOWN_MSGID", ann.sync()[0])
        ann.send(f"REDACT #chat {msgid}\r\n")
        bob.until("spam")
        self.removed("ann", msgid, ann, bob)
        bob.send("@label=L REDACT #chat *\r\n")
        self.assertRegex(bob.sync()[0], "^@label=L :chat.local FAIL REDACT UNKNOWN_MSGID ")

    def test_a_label_is_on_what_its_sender_gets(self) -> None:
        ann, bob, (hers, _) = self.two_lines()
        ann.send(f"@label=L REDACT #chat {hers}\r\n")
        told = ann.until("REDACT")
        self.assertEqual(chat.parse(told).tags["label"], "L")
        self.assertNotIn("label", chat.parse(bob.until("REDACT")).tags)

    def test_only_members_remove_and_only_there(self) -> None:
        ann, bob, (hers, his) = self.two_lines()
        bob.send("JOIN #tea\r\n")
        bob.until(" 366 ")
        rows = [(f"#tea {hers}", "UNKNOWN_MSGID #tea"), (f"ann {his}", "UNKNOWN_MSGID ann")]
        rows += [("#tea *", "UNKNOWN_MSGID #tea"), (f"nobody {hers}", "INVALID_TARGET nobody :")]
        rows += [(f"#nowhere {his}", "INVALID_TARGET #nowhere :"), (f"* {his}", "INVALID_TARGET * :")]
        bob.sync()
        self.answers(bob, [(f"REDACT {line}", [f"FAIL REDACT {error}"]) for line, error in rows])
        bob.send("PART #chat\r\n")
        bob.sync()
        for peer in (bob, self.irc("joe", *self.CAPS)):
            peer.send(f"PART #chat\r\nREDACT #chat {his}\r\n")
            self.assertIn("FAIL REDACT INVALID_TARGET #chat :", peer.sync()[-1])
        ann.sync()
        self.assertEqual(len(self.ask(ann, "CHATHISTORY LATEST #chat * 9")), 2)

    def test_who_takes_the_name_later_is_not_the_author(self) -> None:
        ann, bob, (_, his) = self.two_lines()
        bob.send("QUIT\r\n")
        bob.rest()
        again = self.irc("bob", *self.CAPS)
        again.send(f"REDACT #chat {his}\r\n")
        self.assertIn("REDACT_FORBIDDEN", again.sync()[-1])

    def test_a_token_makes_one_the_author_again(self) -> None:
        self.irc("ann")
        for says in ("PRIVMSG #chat :a slip", f"@{chat.ID_TAG}=1 PRIVMSG #chat :a slip"):
            bob = self.irc("bob", *self.CAPS, token="bob" * 6)
            bob.send(f"{says}\r\n")
            msgid = chat.parse(bob.until("a slip")).tags["msgid"]
            bob.send("QUIT\r\n")
            bob.rest()
            again = self.irc("bobby", *self.CAPS, token="bob" * 6)
            again.send(f"REDACT #chat {msgid}\r\n")
            self.removed("bobby", msgid, again)
            again.send("QUIT\r\n")
            again.rest()

    def test_others_read_of_it(self) -> None:
        """No word of the reason comes from somebody who may not speak."""
        ann, bob, (hers, his) = self.two_lines()
        old, person, script = self.irc("old", "message-tags"), self.plain("nick"), self.peer('{"type":"join"}\n')
        script.until('"event": "join"')
        old.sync()
        ann.send(f"REDACT #chat {his} :off topic\r\n")
        told = chat.parse(old.until("NOTICE"))
        self.assertEqual((told.nick, told.params), ("ann", ("#chat", "*** ann removed a message of bob: off topic")))
        person.until("*** ann removed a message of bob: off topic")
        item = json.loads(script.until("redact"))
        wanted = {"type": "system", "event": "redact", "id": his, "user": "ann", "channel": "#chat"}
        self.assertEqual({key: item[key] for key in wanted}, wanted)
        person.send("a slip of mine\n/redact\n")
        for peer in (person, script):
            peer.until("*** nick removed a message")
        self.assertEqual(json.loads(script.seen[-1])["text"], "*** nick removed a message")
        person.send("/redact\n")
        person.until("*** Error: there is no such message any more")
        script.send(json.dumps({"type": "command", "text": f"/redact {hers} why", "ref": "r"}) + "\n")
        item = json.loads(script.until('"error"'))
        self.assertEqual((item["code"], item["ref"]), ("redact-forbidden", "r"))
        person.send("aside\n")
        ann.until("aside")
        ann.send("MODE #chat +m\r\n")
        person.until("+m")
        person.send("/redact * still speaking\n")
        self.assertEqual(person.until("removed"), "*** nick removed a message")


class MultilineCase(PastCase):
    """Messages of several lines (IRCv3 draft/multiline)."""

    CAPS = (*PastCase.CAPS, chat.MULTILINE_CAP)
    LINES = (
        "@label=xyz;+note=1 BATCH +123 draft/multiline #chat", "@batch=123 PRIVMSG #chat hello",
        "@batch=123 PRIVMSG #CHAT :", "@batch=123 privmsg #chat :how is ",
        "@batch=123;draft/multiline-concat PRIVMSG #chat :everyone?", "BATCH -123",
    )  # fmt: skip
    SAID = [("hello", False), ("", False), ("how is ", False), ("everyone?", True)]

    def say(self, peer: Peer, *lines: str) -> None:
        peer.send("".join(f"{line}\r\n" for line in lines))

    def batch(self, lines: Sequence[str], target: str = "#chat") -> Message:
        """The first line of a batch, after its other lines were compared with SAID."""
        first, *said, last = map(chat.parse, lines)
        reference = first.param(0)[1:]
        self.assertEqual((first.command, first.params[1:]), ("BATCH", (chat.MULTILINE_CAP, target)))
        self.assertEqual((last.command, last.params), ("BATCH", (f"-{reference}",)))
        heads = {(line.command, line.source, line.param(0)) for line in said}
        self.assertEqual(heads, {("PRIVMSG", first.source, target)})
        self.assertEqual([(line.text, chat.CONCAT_TAG in line.tags) for line in said], self.SAID)
        for line in said:
            self.assertEqual(set(line.tags) - {chat.CONCAT_TAG}, {"batch"})
            self.assertEqual(line.tags["batch"], reference)
        return first

    def lines(self, lines: Sequence[str], target: str = "#chat") -> Message:
        """The first of the lines in which others get the same; only that has its id."""
        first, *more = map(chat.parse, lines)
        self.assertEqual([line.params for line in (first, *more)], [(target, text) for text, _ in self.SAID if text])
        for line in more:
            self.assertEqual(line.tags, {tag: value for tag, value in first.tags.items() if tag != "msgid"})
        return first


class Multiline(MultilineCase):
    """They as those see them who know them, and others."""

    def test_a_mixed_audience(self) -> None:
        """The specification's example; blank lines are only for those who know of several."""
        ann, bob = self.two(*self.CAPS)
        tags, old, person = self.irc("tags", *PastCase.CAPS), self.irc("old"), self.plain("nick")
        no_batch = self.irc("half", chat.MULTILINE_CAP, "message-tags", "server-time")
        script = self.peer('{"type":"join"}\n')
        script.until('"event": "join"')
        for peer in (ann, bob, tags, old, no_batch):
            peer.sync()
        person.until("guest1 joined")
        self.say(ann, *self.LINES)
        echo = self.batch(ann.sync())
        self.assertEqual((echo.tags["label"], echo.tags["+note"], echo.nick), ("xyz", "1", "ann"))
        wanted = {tag: value for tag, value in echo.tags.items() if tag != "label"}
        self.assertEqual(self.batch(bob.sync()).tags, wanted)
        for peer in (tags, no_batch):
            self.assertEqual(self.lines(peer.sync()).tags, wanted)
        self.assertEqual(self.lines(old.sync()).tags, {})
        self.told(person, "ann: hello", "ann: how is ", "ann: everyone?")
        item = json.loads(script.until('"chat"'))
        self.assertEqual((item["text"], item["id"]), ("hello\n\nhow is everyone?", wanted["msgid"]))

    def test_long_tags_are_not_repeated(self) -> None:
        """Those who know none of several lines get them with the first only: 4 kB would become 32 times as much."""
        ann, tags = self.irc("ann", *self.CAPS), self.irc("tags", *PastCase.CAPS)
        size = chat.REPEATED_TAG_BYTES - len("@+note= ")
        for length in (size, size + 1):
            self.say(ann, self.LINES[0].replace("=1", f"={'x' * length}"), *self.LINES[1:])
            ann.sync()
            found = [len(chat.parse(line).tags.get("+note", "")) for line in tags.sync() if "PRIVMSG" in line]
            self.assertEqual(found, [length] * 3 if length == size else [length, 0, 0])

    def test_how_it_is_announced(self) -> None:
        value = f"max-bytes={chat.MULTILINE_BYTES},max-lines={chat.MULTILINE_LINES}"
        for asked, told in (("LS 302", f" draft/multiline={value} "), ("LS", " draft/multiline ")):
            peer = self.peer(f"CAP {asked}\r\n")
            self.assertIn(told, peer.until(" LS "))

    def test_private_notice_and_to_oneself(self) -> None:
        ann, bob = self.two(*self.CAPS)
        self.say(ann, *(line.replace("#chat", "bob").replace("#CHAT", "BOB") for line in self.LINES))
        hers = self.batch(ann.sync(), "bob")
        self.assertEqual(self.batch(bob.sync(), "bob").tags["msgid"], hers.tags["msgid"])
        self.say(ann, "BATCH +1 draft/multiline bob", "@batch=1 NOTICE bob a", "@batch=1 NOTICE bob b", "BATCH -1")
        ann.sync()
        self.assertEqual([chat.parse(line).command for line in bob.sync()], ["BATCH", "NOTICE", "NOTICE", "BATCH"])
        self.say(ann, *(line.replace("#chat", "ann").replace("#CHAT", "Ann") for line in self.LINES))
        told = ann.sync()
        self.assertNotIn("label", self.batch(told[:6], "ann").tags)
        self.assertEqual(self.batch(told[6:], "ann").tags["label"], "xyz")

    def test_the_history_has_it_as_one(self) -> None:
        """Also in a batch in a batch, and for those who ask for it, or get it unasked, without knowing of batches."""
        ann = self.irc("ann", *self.CAPS)
        self.say(ann, "PRIVMSG #chat :before", *self.LINES, "PRIVMSG #chat :after")
        said = self.batch(ann.sync()[1:-1])
        ann.send("CHATHISTORY LATEST #chat * 2\r\n")
        first, *inside, after, last = ann.sync()
        outer = chat.parse(first).param(0)[1:]
        told = self.batch(inside).tags
        self.assertEqual(told, {**{tag: said.tags[tag] for tag in said.tags if tag != "label"}, "batch": outer})
        self.assertEqual((chat.parse(after).text, chat.parse(last).params), ("after", (f"-{outer}",)))
        ann.send(f"@label=L CHATHISTORY AFTER #chat msgid={said.tags['msgid']} 9\r\n")
        self.assertEqual([chat.parse(line).text for line in ann.sync()[1:-1]], ["after"])
        tags = self.irc("tags", *PastCase.CAPS)
        lines = self.ask(tags, "CHATHISTORY LATEST #chat * 2")[:3]
        self.assertEqual(self.lines([chat.format_tagged(line) for line in lines]).tags["msgid"], said.tags["msgid"])
        old = self.peer("NICK old\r\nUSER o 0 * :o\r\nJOIN #chat\r\n")
        old.until(":before")
        self.lines([str(old.line()) for _ in range(3)])
        self.assertIn(":after", str(old.line()))
        person = self.peer("nick\n")
        person.until("ann: before")
        self.told(person, "ann: hello", "ann: how is ", "ann: everyone?", "ann: after")
        script = self.peer('{"type":"join"}\n')
        self.assertEqual(json.loads(script.until("hello"))["text"], "hello\n\nhow is everyone?")

    def test_the_limits_themselves_are_allowed(self) -> None:
        ann, bob = self.two(*self.CAPS)
        most = ["x" * (chat.MULTILINE_BYTES // 16 - 1)] * 15 + ["y" * (chat.MULTILINE_BYTES // 16)]
        for texts in (most, [str(number) for number in range(chat.MULTILINE_LINES)]):
            begin, end = "BATCH +1 draft/multiline #chat", "BATCH -1"
            self.say(ann, begin, *(f"@batch=1 PRIVMSG #chat :{text}" for text in texts), end)
            for peer in (ann, bob):
                self.assertEqual([chat.parse(line).text for line in peer.sync()[1:-1]], texts)

    def test_scripts_send_them_in_one_line(self) -> None:
        ann, bob = self.two(*self.CAPS)
        script = self.peer('{"type":"join","user":"joe"}\n')
        for peer in (ann, bob):
            peer.until("JOIN")
        script.until('"join"')

        def say(text: str, **item: str) -> dict[str, Any]:
            script.send(json.dumps({"type": "chat", "ref": "r", "text": text, **item}) + "\n")
            return dict(json.loads(script.until('"ref"')))

        self.assertEqual(say("\na\n\n b\n\n")["type"], "ack")
        self.assertEqual([chat.parse(line).text for line in ann.sync()[1:-1]], ["a", "", " b"])
        self.assertEqual(say("a\n", type="private", to="bob")["type"], "ack")
        self.assertEqual([chat.parse(line).params for line in bob.sync()[-1:]], [("bob", "a")])
        for text, code in (
            ("x\n" * 33, "multiline-max-lines"), ("x" * 500 + "\nx", "too-long"), ("a\n\rb", "bad-character"),
            (("x" * 400 + "\n") * 11, "multiline-max-bytes"), ("\n\n", "no-text"),
        ):  # fmt: skip
            with self.subTest(code):
                told = say(text)
                self.assertEqual((told["type"], told["code"]), ("error", code))
        with self.assertRaises(chat.CommandError):  # none of them begins to be sent
            chat.JSON.decode(json.dumps({"type": "chat", "text": "x\n" * 33}).encode(), True)
        self.assertEqual(say("next\nlast")["type"], "ack")
        self.assertEqual([chat.parse(line).text for line in ann.sync()[1:-1]], ["next", "last"])

    def test_each_line_of_a_script_takes_a_token(self) -> None:
        self.exempt("10.0.0.0/8")
        self.limit(burst=100, rate=0.001)
        script = self.peer('{"type":"join","user":"joe"}\n{"type":"chat","text":"a\\nb\\nc","ref":"r"}\n')
        script.until('"ack"')
        bucket = self.server.hub.nicks["joe"].flood_bucket
        assert bucket
        self.assertFalse(bucket.debit(time.monotonic(), 96))  # 100, and four lines
        self.assertTrue(bucket.debit(time.monotonic()))

    def test_no_row_and_no_line_is_forged(self) -> None:
        """Whatever is in a line."""
        ann, bob = self.two(*self.CAPS)
        old, person = self.irc("old"), self.plain("nick")
        forged = ["*** bob left", ":bob!b@h PRIVMSG #chat :no", "bob: no", "\x1b[2Jx", "BATCH -1", "\u2028x", "\x85x"]
        lines = (f"@batch=1 PRIVMSG #chat :{text}" for text in forged)
        self.say(ann, "BATCH +1 draft/multiline #chat", *lines, "BATCH -1")
        ann.sync()
        self.assertEqual([chat.parse(line).text for line in bob.sync() if "PRIVMSG" in line], forged)
        told = [message for message in map(chat.parse, old.sync()) if message.command != "JOIN"]
        self.assertEqual([(message.nick, message.text) for message in told], [("ann", text) for text in forged])
        self.told(person, *(f"ann: {chat.escape_controls(text)}" for text in forged))

    def test_sent_again_it_is_said_once(self) -> None:
        ann, told = self.irc("ann", *self.CAPS), []
        for _ in range(2):
            bob = self.irc("bob", *self.CAPS, token="bob" * 6)
            self.say(bob, f"@{chat.ID_TAG}=7 BATCH +123 draft/multiline #chat", *self.LINES[1:])
            told.append(self.batch([bob.until("BATCH +"), *bob.sync()]).tags)
            bob.reset()
        self.assertEqual(*told)
        self.assertEqual([line.command for line in map(chat.parse, ann.sync())].count("BATCH"), 2)

    def test_one_redaction_removes_all(self) -> None:
        ann = self.irc("ann", *self.CAPS)
        self.say(ann, *self.LINES, "REDACT #chat *")
        ann.until("REDACT")
        self.assertEqual(self.ask(ann, "CHATHISTORY LATEST #chat * 9"), [])


class MultilineRefused(MultilineCase):
    """What is no message of several lines, and from whom none is taken."""

    def fails(self, peer: Peer, error: str, *lines: str) -> None:
        """What is sent is answered with one error, and nobody else gets anything."""
        with self.subTest(lines[-2:]):
            self.say(peer, *lines)
            told = peer.sync()
            self.assertEqual(len(told), 1, told)
            self.assertIn(f" FAIL BATCH {error} :", told[0])

    def test_errors(self) -> None:
        """Each ends the batch; what comes of that later is ignored, and what comes after it is not."""
        ann, bob = self.two(*self.CAPS)
        begin, line, end = "@label=L BATCH +1 draft/multiline #chat", "@batch=1 PRIVMSG #chat ", "BATCH -1"
        limit = chat.MULTILINE_BYTES
        over = ["x" * (limit // 16 - 1)] * 15 + ["y" * (limit // 16 + 1)]
        for error, lines in (
            ("MULTILINE_INVALID_TARGET #chat #tea", [f"{line}:a", "@batch=1 PRIVMSG #tea :b", f"{line}:c"]),
            (f"MULTILINE_MAX_BYTES {limit}", [line + text for text in over]),
            (f"MULTILINE_MAX_LINES {chat.MULTILINE_LINES}", [line + "x"] * (chat.MULTILINE_LINES + 5)),
            ("MULTILINE_INVALID", ["@batch=2 PRIVMSG #chat :a"]),
            ("MULTILINE_INVALID", ["PRIVMSG #chat :a"]),
            ("MULTILINE_INVALID", [f"{line}:a", f"{line}:".replace("=1", f"=1;{chat.CONCAT_TAG}")]),
            ("MULTILINE_INVALID", [f"{line}:a", "@batch=1 NOTICE #chat :b"]),
            ("MULTILINE_INVALID", ["@batch=1 TAGMSG #chat"]),
            ("MULTILINE_INVALID", ["@batch=1 PRIVMSG #chat"]),
            ("MULTILINE_INVALID", [f"{line}:", f"{line}:"]),
            ("MULTILINE_INVALID", []),
            ("MULTILINE_INVALID", ["PART #chat"]),
            ("MULTILINE_INVALID", ["BATCH +2 draft/multiline #chat"]),
            ("MULTILINE_INVALID", ["BATCH 1"]),
        ):  # fmt: skip
            self.fails(ann, error, begin, *lines, end)
            self.assertEqual(chat.parse(ann.seen[-2]).tags["label"], "L")
            self.assertEqual(self.server.hub.nicks["ann"].batch, None)
        for lines in (
            ["BATCH +1 netjoin #chat"], ["BATCH +1 draft/multiline"], ["BATCH +1 draft/multiline #chat,bob"],
            ["BATCH + draft/multiline #chat"],
            ["@batch=9 PRIVMSG #chat :a"], ["BATCH -9"],
        ):  # fmt: skip
            self.fails(ann, "MULTILINE_INVALID", *lines)
        self.answers(ann, [(f"{begin}\r\n{line}a\r\n{line}{'x' * 490}\r\n{end}", ["@label=L :chat.local 417 "])])
        self.fails(ann, "MULTILINE_INVALID", begin, "@batch=2 PRIVMSG #chat :a", "@batch=1 PRIVMSG #chat :b")
        self.say(ann, "PRIVMSG #chat :next")
        self.assertIn(":next", ann.sync()[0])
        self.assertEqual(len(bob.sync()), 1)
        self.say(bob, "BATCH +1 draft/multiline #chat", "PING me", "@batch=1 PRIVMSG #chat a", "QUIT")
        self.assertEqual([line for line in bob.rest() if "BATCH" in line], [])
        ann.until("QUIT")

    def test_nobody_without_the_capability_sends_one(self) -> None:
        ann = self.irc("ann", "batch", "message-tags", "echo-message")
        self.answers(ann, [("BATCH +1 draft/multiline #chat", ["421"]), ("@batch=1 PRIVMSG #chat :a", [":a"])])
        self.answers(ann, [(f"@{chat.LINES_TAG}=1,1 PRIVMSG #chat :a b", ["PRIVMSG #chat :a b"])])
        self.answers(ann, [(f"CAP REQ :{chat.MULTILINE_CAP}", ["ACK"]), (f"CAP REQ :-{chat.MULTILINE_CAP}", ["ACK"])])

    def test_who_may_not_speak_gets_one_error(self) -> None:
        """As things are when the last line has come; each line counts where the channel takes no CTCP."""
        ann, bob = self.two(*self.CAPS)
        begin, end, line = "BATCH +1 draft/multiline #chat", "BATCH -1", "@batch=1 PRIVMSG #chat :"
        for command, texts, error in (
            ("MODE #chat +m", "ab", "404"), ("MODE #chat -m+b bob", "ab", "404"),
            ("MODE #chat -b+C bob", ["a", "\x01VERSION\x01"], "404"), ("KICK #chat bob", "ab", "404"),
        ):  # fmt: skip
            with self.subTest(command):
                self.say(bob, begin, f"{line}{texts[0]}")
                bob.sync()
                self.say(ann, command)
                ann.sync()
                bob.sync()
                self.say(bob, f"{line}{texts[1]}", end)
                told = bob.sync()
                self.assertEqual(len(told), 1, told)
                self.assertIn(f" {error} bob #chat ", told[0])
        self.assertEqual(ann.sync(), [])

    def test_a_batch_ends_with_its_connection(self) -> None:
        bob = self.irc("bob", *self.CAPS, token="bob" * 6)
        self.say(bob, "BATCH +1 draft/multiline #chat", "@batch=1 PRIVMSG #chat a")
        bob.sync()
        bob.reset()
        again = self.irc("bob", *self.CAPS, token="bob" * 6)
        self.fails(again, "MULTILINE_INVALID", "@batch=1 PRIVMSG #chat b")
        self.fails(again, "MULTILINE_INVALID", "BATCH -1")
        self.assertEqual(self.ask(again, "CHATHISTORY LATEST #chat * 9"), [])


class Unreliable(chat.MemoryHistory):
    """A history that can be made to fail, or to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.why = ""
        self.forgets_nothing = False
        self.waits = False
        self.may_go = threading.Event()
        self.may_go.set()

    def append(self, messages: list[tuple[str, Message]], states: Sequence[chat.ChannelState] = ()) -> None:
        self.waits = not self.may_go.is_set()
        self.may_go.wait(PATIENCE)
        if self.why:
            raise chat.StorageError(self.why)
        super().append(messages, states)

    def fetch(self, *args: Any) -> list[Message]:
        if self.why:
            raise chat.StorageError(self.why)
        return super().fetch(*args)

    def remove(self, names: Sequence[str], number: int) -> None:
        if self.forgets_nothing:
            raise chat.StorageError("read only")
        super().remove(names, number)


class Receipts(ServerCase):
    """Nothing is confirmed, or seen, before it is stored."""

    def setUp(self) -> None:
        self.history = Unreliable()
        self.serve(chat.Server("127.0.0.1", 0, chat.Hub(chat.SERVER_NAME, self.history)))

    def test_stored_before_anybody_sees_it(self) -> None:
        ann, bob = self.irc("ann", "echo-message"), self.plain("bob")
        ann.until("JOIN")
        self.history.may_go.clear()
        ann.send("PRIVMSG #chat hello\r\n")
        for peer in (ann, bob):
            peer.sock.settimeout(0.2)
            with self.assertRaises(socket.timeout):
                peer.line()
            peer.sock.settimeout(PATIENCE)
        self.history.may_go.set()
        ann.until("PRIVMSG #chat :hello")
        self.assertEqual(bob.until(":"), "ann: hello")

    def test_a_repeat_is_confirmed_only_if_the_first_was_stored(self) -> None:
        ann = self.irc("ann", "echo-message", "message-tags", "standard-replies", chat.RESUME_CAP)
        other = self.irc("bob", "echo-message", "message-tags", "standard-replies", token="x" * 16)
        obeyed: list[tuple[Any, ...]] = []

        def counted(*args: Any, handle_line: Any = chat.handle_line) -> None:
            handle_line(*args)
            obeyed.append(args)

        self.history.why = "the disk is full"
        self.history.may_go.clear()
        line = f"@{chat.ID_TAG}=k1 PRIVMSG #chat :hello\r\n"
        with self.logs(), mock.patch.object(chat, "handle_line", counted):
            other.send(line)
            self.eventually(lambda: self.history.waits, "the mailer does not store")
            other.send(line)
            self.eventually(lambda: len(obeyed) == 2, "the repeat is not in the log")
            self.history.may_go.set()
            for _ in range(2):
                self.assertIn("FAIL PRIVMSG CANNOT_STORE", other.line() or "")
            self.history.why = ""
            other.send(line)
            self.assertIn("PRIVMSG #chat :hello", other.line() or "")
        self.assertEqual(len([text for text in ann.sync() if "hello" in text]), 1)

    def test_who_is_told_that_it_was_not_said_was_not_stored(self) -> None:
        """Whatever others say between a message and its storing, while another program locks the file now and then."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = os.path.join(folder.name, "history")
        self.serve(chat.Server("127.0.0.1", 0, chat.Hub(chat.SERVER_NAME, chat.SqliteHistory(path))))
        self.server.hub.history._rows("PRAGMA busy_timeout = 50")  # type: ignore[attr-defined]
        caps = ("echo-message", "message-tags", "standard-replies", "labeled-response")
        crew = [self.irc(name, *caps, token=name * 8) for name in ("ann", "bob", "cat")]
        other = sqlite3.connect(path, isolation_level=None)
        self.addCleanup(other.close)
        echoed: set[str] = set()
        failed: set[str] = set()
        with mock.patch.object(chat, "DEDUP_IDS", 3), self.logs():
            for turn in range(4):
                other.execute("BEGIN IMMEDIATE")
                for number in range(10):
                    for peer in crew:
                        peer.send(
                            f"@label=L;{chat.ID_TAG}={turn}.{number} PRIVMSG #chat :{id(peer)}.{turn}.{number}\r\n"
                        )
                if turn % 2:
                    self.eventually(lambda: self.server.hub.storage_error, "nothing failed")
                other.execute("ROLLBACK")
                for peer in crew:
                    told = [line for line in peer.sync() if "label=L" in line]
                    self.assertEqual(len(told), 10)
                    for number, line in enumerate(told):
                        (failed if "FAIL" in line else echoed).add(f"{id(peer)}.{turn}.{number}")
        history = chat.SqliteHistory(path, readonly=True)
        self.addCleanup(history.close)
        stored = [item.text for item in history.transcript(0)]
        self.assertTrue(failed and echoed)
        self.assertEqual(sorted(stored), sorted(echoed))

    def test_what_was_not_said_to_one_because_of_another_is_said_when_sent_again(self) -> None:
        caps = ("echo-message", "message-tags", "batch", "labeled-response", "standard-replies")
        bob, ann = self.plain("bob"), self.irc("ann", *caps, token="x" * 16)
        line = f"@label=L;{chat.ID_TAG}=k1 PRIVMSG #chat,bob :psst\r\n"
        self.history.why = "the disk is full"
        with self.logs():
            ann.send(line)
            ann.until("FAIL PRIVMSG CANNOT_STORE")
            self.history.why = ""
            for _ in range(2):
                ann.send(line)
                self.assertIn("PRIVMSG #chat :psst", ann.until("PRIVMSG #chat"))
                self.assertIn("PRIVMSG bob :psst", ann.until("PRIVMSG bob"))
        ann.send("PRIVMSG #chat :end\r\n")
        bob.until("ann: end")
        said = [text for text in bob.seen if "psst" in text]
        self.assertEqual(said, ["ann: psst", "[private] ann: psst"])

    def test_what_cannot_be_stored_is_not_said(self) -> None:
        ann = self.irc("ann", "echo-message", "batch", "labeled-response", "standard-replies")
        bob, script = self.plain("bob"), self.peer('{"type":"join","user":"bot"}\n')
        script.until('"join"')
        ann.sync()
        line = "PRIVMSG #chat :hello\r\n"
        self.history.why = "the disk is full"
        with self.logs(logging.ERROR) as caught:
            why = ":chat.local FAIL PRIVMSG CANNOT_STORE :not said, because it cannot be stored: the disk is full"
            ann.send(f"{line}@label=L {line}")
            self.assertEqual(ann.sync(), [why, f"@label=L {why}"])
            script.send('{"type":"chat","text":"hello","ref":"7"}\n')
            item = json.loads(script.line() or "")
            self.assertEqual((item["type"], item["code"], item["ref"]), ("error", "cannot-store", "7"))
            bob.send("hello\n/msg ann psst\n")
            self.assertIn("*** Error: not said, because it cannot be stored", bob.until("Error"))
            self.assertTrue(ann.until("psst").endswith("PRIVMSG ann :psst"))  # the chat goes on
            ann.send("CHATHISTORY LATEST #chat * 5\r\n")
            self.assertIn("FAIL CHATHISTORY MESSAGE_ERROR :", ann.line() or "")
        self.assertEqual(len(caught), 1)
        self.history.why = ""
        with self.logs(logging.WARNING):
            ann.send(line)
            self.assertIn("PRIVMSG #chat :hello", ann.until("PRIVMSG"))
        self.assertEqual(bob.until("hello"), "ann: hello")
        self.assertEqual([text for text in bob.seen if "hello" in text], ["ann: hello"])

    def test_a_message_is_not_removed_for_anybody_where_that_cannot_be_stored(self) -> None:
        ann, bob = self.two("echo-message", "message-tags", "labeled-response", "batch", chat.REDACT_CAP)
        ann.send("PRIVMSG #chat :a slip\r\n")
        bob.until("a slip")
        ann.sync()
        self.history.forgets_nothing = True
        ann.send("@label=L REDACT #chat *\r\n")
        self.assertIn("FAIL REDACT CANNOT_STORE :not removed, because that cannot be stored: read only", ann.sync()[0])
        self.assertEqual(bob.sync(), [])
        self.history.forgets_nothing = False
        ann.send("PRIVMSG #chat :another\r\nREDACT #chat *\r\n")  # may be in one batch
        ann.sync()
        self.assertEqual([chat.parse(line).command for line in bob.sync()], ["PRIVMSG", "REDACT"])
        self.assertEqual(self.plain("nick").until("ann:"), "ann: a slip")

    def test_what_was_not_said_is_not_in_a_private_conversation(self) -> None:
        ann, _ = self.two("draft/chathistory")
        self.history.why = "disk full"
        with self.logs(logging.WARNING):
            ann.send("PRIVMSG bob,#chat :psst\r\nCHATHISTORY LATEST bob * 9\r\n")
            self.assertEqual([chat.parse(line).params[1] for line in ann.sync()], ["CANNOT_STORE"])


class ResumeCase(ServerCase):
    """A client whose connection is lost comes back as if nothing had happened."""

    TOKEN = "0123456789abcdef"

    def bob(self, token: str = TOKEN, name: str = "bob", address: str = "127.0.0.1") -> Peer:
        caps = f"echo-message message-tags batch draft/chathistory {chat.RESUME_CAP}"
        start = f"CAP REQ :{caps}\r\nRESUME {token}\r\nNICK {name}\r\nUSER {name} 0 * :x\r\nCAP END\r\n"
        return self.peer_from(address, self.port, start)

    def both(self) -> tuple[Peer, Peer]:
        """ann, and bob who can come back, in one channel."""
        ann, bob = self.irc("ann"), self.bob()
        bob.send("JOIN #chat\r\n")
        bob.until(" 366 ")
        ann.until("JOIN")
        return ann, bob

    def lose(self, peer: Peer) -> None:
        """Resets a connection, and waits until the server knows."""
        before = self.connections()
        peer.reset()
        self.eventually(lambda: self.connections() < before, "the loss was not noticed")


class Resume(ResumeCase):
    """Nobody notices that a client was away, and nobody else can use that."""

    def test_that_somebody_types_is_not_kept_for_later(self) -> None:
        ann, bob = self.irc("ann", "message-tags"), self.bob()
        bob.until(" 376 ")
        self.lose(bob)
        ann.send("@+typing=active TAGMSG bob\r\n" * (chat.RESUME_QUEUE + 1) + "PRIVMSG bob :psst\r\n")
        self.assertIn(" 301 ann bob :no connection", ann.until(" 301 "))
        bob = self.bob()
        self.assertTrue(bob.until("ann!").endswith(":ann!ann@localhost PRIVMSG bob :psst"))

    def test_nobody_notices(self) -> None:
        ann, bob = self.both()
        self.lose(bob)
        ann.send("JOIN #tea\r\nINVITE bob #tea\r\n")
        self.assertIn(" 301 ann bob :no connection", ann.until("301"))
        ann.send("PRIVMSG bob :psst\r\nPRIVMSG #chat :hello\r\n")
        self.assertIn(" 301 ann bob :no connection", ann.until("301"))
        ann.send(f"REDACT bob {int(time.time()):x}\r\n")  # who could not be told now
        self.assertIn("only members may remove", ann.until("NOTICE"))
        other = self.bob("another-secret-token")
        self.assertIn("433", other.until("433"))
        bob = self.bob()
        bob.until(":bob!bob@localhost JOIN #chat")
        self.assertIn("@ann bob", bob.until(" 353 "))
        self.assertTrue(bob.until("INVITE").endswith(":ann!ann@localhost INVITE bob :#tea"))
        self.assertTrue(bob.until("psst").endswith(":ann!ann@localhost PRIVMSG bob :psst"))
        bob.send("PRIVMSG #chat :back\r\n")
        bob.sync()
        self.assertEqual(ann.sync(), [":bob!bob@localhost PRIVMSG #chat :back"])
        self.lose(bob)
        bob = self.bob()
        bob.until(" 353 ")
        bob.send("REDACT #chat *\r\n")
        self.assertEqual(ann.until("removed"), ":bob!bob@localhost NOTICE #chat :*** bob removed a message")
        self.assertEqual([line for line in bob.sync() if "psst" in line or "INVITE" in line], [])  # told once only
        bob.send("QUIT\r\n")
        ann.until("QUIT")

    def test_a_connection_that_looks_alive_is_replaced(self) -> None:
        ann, bob = self.both()
        again = self.bob()
        again.until(" 366 ")
        self.assertIn("ERROR :You have come back on another connection", bob.rest()[-1])
        self.assertEqual(ann.sync(), [])

    def test_lost_again_before_it_was_back(self) -> None:
        ann, bob = self.both()
        self.lose(bob)
        half = self.peer(f"CAP REQ :{chat.RESUME_CAP}\r\nRESUME {self.TOKEN}\r\nNICK bob\r\n")
        half.until("CAP")
        half.close()
        self.eventually(lambda: self.connections() == 1, "it is not gone")
        self.assertEqual(ann.sync(), [])
        self.bob().until(" 366 ")
        self.assertEqual(ann.sync(), [])

    def test_the_absent_keep_nobody_out(self) -> None:
        self.limit(clients=1)
        bob = self.bob()
        bob.until(" 376 ")
        self.lose(bob)
        self.eventually(lambda: not self.connections(), "the connection is not closed")
        self.bob().until(" 376 ")

    def away(self, name: str, address: str = "127.0.0.1") -> None:
        """Somebody comes, and loses the connection."""
        peer = self.bob(name * 6, name, address)
        peer.until(" 376 ")
        self.lose(peer)

    def here(self, asker: Peer, names: str) -> str:
        asker.send(f"ISON {names}\r\n")
        return asker.until(" 303 ").rpartition(":")[2]

    def test_the_absent_count_with_their_address_and_in_all(self) -> None:
        self.limit(per_address=3, burst=1000)
        with mock.patch.object(chat, "CONNECT_INTERVAL_S", 0.001):
            self.exempt("")
            for name in ("lost1", "lost2", "lost3"):
                self.away(name)
            self.bob("lost2" * 6, "lost2").until(" 376 ")  # one of them is back: nobody has to go
            ann = self.irc("ann")
            self.assertEqual(self.here(ann, "lost1 lost2 lost3"), "lost2 lost3")
            self.limit(per_address=100, clients=4)
            self.assertEqual(self.here(self.irc("eve"), "lost1 lost2 lost3"), "lost2 lost3")
            self.assertEqual(self.here(self.irc("joe"), "lost1 lost2 lost3"), "lost2")

    @unittest.skipUnless(sys.platform == "linux", "needs Linux: 127.0.0.2 is another address")
    def test_nobody_takes_the_places_of_the_absent_from_others(self) -> None:
        with mock.patch.object(chat, "MAX_RESUMABLE", 3):
            for number in range(5):
                self.away(f"lost{number}", "127.0.0.3")
            self.away("eve", "127.0.0.2")
            ann = self.irc("ann")
            self.assertEqual(self.here(ann, "lost0 lost1 lost2 lost3 lost4 eve"), "lost3 lost4 eve")

    def test_coming_back_brings_no_fresh_allowance(self) -> None:
        with mock.patch.object(chat, "NICK_CHANGE_S", 1000.0):
            bob = self.bob()
            bob.until(" 376 ")
            bob.send("".join(f"NICK bob{number}\r\n" for number in range(4)))
            bob.until("NICK :bob3")
            again = self.bob(name="bob3")  # while the old connection looks alive
            again.until(" 376 ")
            again.send("NICK bob4\r\nNICK bob5\r\n")
            self.assertIn(" 438 bob4 bob5 ", again.until(" 438 "))
            bob.rest()
            bob.close()
            self.eventually(lambda: self.connections() == 1, "the old connection is left")
            self.lose(again)
            bob = self.bob(name="bob4")
            bob.until(" 376 ")
            bob.send("NICK bob5\r\n")
            self.assertIn(" 438 bob4 bob5 ", bob.until(" 438 "))


class Resent(ResumeCase):
    """What a client sends again is said once."""

    def test_an_id_counts_for_each_target(self) -> None:
        bob = self.bob()
        ann = self.irc("ann")
        for peer in (bob, ann):
            peer.send("JOIN #chat,#x\r\n")
            peer.until("366 " if peer is ann else "#x :End")
        bob.send(f"@{chat.ID_TAG}=q PRIVMSG #chat,#x :multi\r\n")
        bob.sync()
        said = [line.partition("PRIVMSG ")[2] for line in ann.sync() if "PRIVMSG" in line]
        self.assertEqual(said, ["#chat :multi", "#x :multi"])

    def test_who_does_not_come_back_leaves(self) -> None:
        ann = self.irc("ann")
        with mock.patch.object(chat, "RESUME_GRACE_S", 0.1):
            bob = self.bob()
            bob.send("JOIN #chat\r\n")
            bob.until(" 366 ")
            self.lose(bob)
            self.assertIn("QUIT :Connection lost", ann.until("QUIT"))

    def test_what_is_sent_again_is_said_once(self) -> None:
        ann, bob = self.irc("ann"), self.bob()
        bob.send("JOIN #chat\r\n")
        line = f"@{chat.ID_TAG}=1 PRIVMSG #chat :hello\r\n"
        bob.send(line)
        first = bob.until("PRIVMSG #chat")
        self.lose(bob)
        bob = self.bob()
        bob.send(line)
        self.assertEqual(bob.until("PRIVMSG #chat"), first)
        stranger = self.bob("another-secret-token", "cat")
        stranger.send(f"JOIN #chat\r\n{line}")
        stranger.until("PRIVMSG #chat")
        said = [text for text in ann.sync() if "PRIVMSG" in text]
        self.assertEqual([text.partition("!")[0] for text in said], [":bob", ":cat"])

    def flood(self, peer: Peer, lines: int) -> None:
        """Says much, all of which may be sent again."""
        for number in range(lines):
            peer.send(f"@{chat.ID_TAG}=f{number} PRIVMSG #chat :flood\r\n")
        peer.sync()

    def test_nobody_makes_the_server_forget_what_others_may_send_again(self) -> None:
        ann, bob = self.both()

        lines = [f"@{chat.ID_TAG}={target} PRIVMSG {target} :hello\r\n" for target in ("#chat", "ann")]
        bob.send(lines[0])
        first = bob.until("PRIVMSG #chat")
        bob.send(lines[1])
        bob.sync()
        self.lose(bob)
        eve = self.bob("another-secret-token", "eve")
        eve.send("JOIN #chat\r\n")
        with mock.patch.object(chat, "DEDUP_IDS", 5), mock.patch.object(chat, "MEMORY_LINES", 5):
            self.flood(eve, 20)
        bob = self.bob()
        bob.send("".join(lines))
        self.assertEqual(bob.until("PRIVMSG #chat :hello"), first)
        bob.sync()
        self.assertEqual(len([line for line in ann.sync() if "hello" in line]), 2)

    def test_an_unknown_id_is_looked_up_in_the_history(self) -> None:
        """Of one's own many, of a session that is gone, and after a restart; also beside a line that is new."""
        first = ""
        with tempfile.TemporaryDirectory() as folder:
            self.stop(self.server, self.thread)
            for turn in range(2):
                history = chat.SqliteHistory(os.path.join(folder, "history"))
                self.serve(chat.Server("127.0.0.1", 0, chat.Hub(chat.SERVER_NAME, history)))
                with mock.patch.object(chat, "DEDUP_IDS", 5):
                    ann, bob = self.both()
                    line = f"@{chat.ID_TAG}=1 PRIVMSG #chat :hello\r\n"
                    bob.send(line)
                    told = bob.until("PRIVMSG #chat :hello")
                    first = first or told
                    self.assertEqual(told, first)
                    self.flood(bob, 20)
                    for _ in range(3):
                        bob.send(line)
                        self.assertEqual(bob.until("PRIVMSG #chat :hello"), first)
                    bob.send(f"JOIN #new\r\n{line.replace('#chat', '#new,#chat')}")
                    bob.sync()
                    said = [text.partition("PRIVMSG")[2] for text in bob.seen if "PRIVMSG" in text][-2:]
                    self.assertEqual(sorted(said), [" #chat :hello", " #new :hello"])
                    heard = [text for text in ann.sync() if "hello" in text]
                    self.assertEqual(len(heard), 0 if turn else 1)
                self.stop(self.server, self.thread)

    def test_one_line_sent_on_two_connections_at_once(self) -> None:
        hub = self.server.hub
        ann, bob = self.both()
        cat = self.bob(name="cat")
        cat.send("JOIN #chat\r\n")
        for peer in (cat, bob, ann):
            peer.sync()
        line = f"@{chat.ID_TAG}=1 PRIVMSG #chat :hello\r\n"
        commit = chat.commit
        batches: list[chat.Call] = []

        def held_up(hub: chat.Hub, batch: list[chat.Call]) -> list[chat.Effect]:
            batches.extend(batch)
            whole = [] if sum(call.message.text == "hello" for call in batches) < 2 else list(batches)
            del batches[: len(whole)]
            return commit(hub, whole)

        with mock.patch.object(chat, "commit", held_up):
            bob.send(line)
            cat.send(line)
            receipts = {chat.parse(peer.until("hello")).tags["msgid"] for peer in (bob, cat)}
        self.assertEqual(len(receipts), 1)
        self.assertEqual(len([text for text in ann.sync() if "hello" in text]), 1)
        self.assertEqual(hub.history.last_sequence(), int(receipts.pop(), 16))


class Restarted(ServerCase):
    """What a channel keeps while nobody is in it, or the server is started again."""

    CAPS = ("batch", "draft/chathistory")

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = os.path.join(folder.name, "history")
        self.begin()

    def begin(self) -> None:
        self.serve(chat.Server("127.0.0.1", 0, chat.Hub(chat.SERVER_NAME, chat.SqliteHistory(self.path))))

    def restart(self, kept: bool = True) -> None:
        """Begins again, with the same file or in memory."""
        self.stop(self.server, self.thread)
        if kept:
            self.begin()
        else:
            self.serve(chat.Server("127.0.0.1", 0))

    def someone(self, name: str, *caps: str, token: str = "") -> Peer:
        peer = self.irc(name, *caps, token=token)
        peer.send("PART #chat\r\n")
        peer.sync()
        return peer

    def tried(self, peer: Peer, channel: str) -> list[str]:
        """What somebody gets who joins, from a file and from memory."""
        peer.send(f"JOIN {channel}\r\n")
        return [line.partition(" ")[2] if line.startswith(":chat") else line for line in peer.sync()]

    def test_key_bans_and_topic_are_there_again(self) -> None:
        ann = self.someone("ann", token="ann" * 6)
        ann.send("JOIN #Tea\r\nMODE #tea +klbm cup 5 eve!*@*\r\nTOPIC #tea :hot\r\nPRIVMSG #tea :psst\r\n")
        ann.send("MODE #tea\r\nMODE #tea b\r\n")
        modes = [line for line in ann.sync() if re.search(" (324|329|367) ", line)]
        ann.send("PRIVMSG ann :for nobody else\r\n")
        ann.sync()
        for _ in range(2):  # also if nobody has been there meanwhile
            self.restart()
        history = self.server.hub.history
        assert isinstance(history, chat.SqliteHistory)
        self.assertEqual([item.text for item in history.transcript(0)], ["psst"])
        eve, cat, ann = self.someone("eve"), self.someone("cat"), self.someone("ann", token="ann" * 6)
        self.assertIn("474 eve #Tea", self.tried(eve, "#tea cup")[0])
        self.assertIn("475 cat #Tea", self.tried(cat, "#tea")[0])
        told = "\n".join(self.tried(ann, "#tea cup"))
        for wanted in ("332 ann #Tea :hot", "333 ann #Tea ann!ann@localhost", ":@ann", "PRIVMSG #Tea :psst"):
            self.assertIn(wanted, told)
        ann.send("MODE #tea\r\nMODE #tea b\r\n")
        self.assertEqual([line for line in ann.sync() if re.search(" (324|329|367) ", line)], modes)
        ann.send("PART #tea\r\n")
        ann.sync()
        self.restart()
        told = "\n".join(self.tried(self.someone("eve"), "#tea"))
        self.assertIn(":@eve", told)  # it had ended before
        self.assertNotIn("psst", told)

    def test_nobody_reads_what_was_said_under_a_key_that_is_lost(self) -> None:
        for kept in (True, False):
            for tea, modes, end in (
                ("#a", "+k cup", "PART #a"), ("#b", "+i", "QUIT"), ("#c", "+k cup", "MODE #c -k"),
                ("#d", "+i", "MODE #d -i"),
            ):  # fmt: skip
                with self.subTest(modes=modes, end=end, kept=kept):
                    ann = self.someone("ann", *self.CAPS)
                    ann.send(f"JOIN {tea}\r\nMODE {tea} {modes}\r\nPRIVMSG {tea} :psst\r\n{end}\r\n")
                    ann.sync() if end != "QUIT" else ann.rest()
                    eve, cat = self.someone("eve"), self.someone("cat", *self.CAPS)
                    told = self.tried(eve, tea) + self.tried(cat, tea)
                    cat.send(f"CHATHISTORY LATEST {tea} * 10\r\n")
                    told += cat.sync()
                    self.assertNotIn("psst", "\n".join(told))
                    eve.send(f"PRIVMSG {tea} :hello\r\n")
                    eve.sync()
                    self.assertIn("hello", "\n".join(self.tried(self.someone("dan"), tea)))
                self.restart(kept)
            self.restart(False)
        history = chat.SqliteHistory(self.path, readonly=True)
        self.addCleanup(history.close)
        self.assertEqual([item.text for item in history.transcript(0)], ["psst", "hello"] * 4)  # the owner reads all

    def test_who_moderates_after_a_restart(self) -> None:
        ann, bob = self.someone("ann", token="ann" * 6), self.someone("bob", token="bob" * 6)
        ann.send("JOIN #tea\r\nMODE #tea +i\r\nINVITE bob #tea\r\n")
        ann.sync()
        bob.send("JOIN #tea\r\nJOIN #cup\r\nPART #cup\r\n")
        bob.sync()
        for _ in range(2):
            self.restart()
            bob, ann = self.someone("bob", token="bob" * 6), self.someone("ann", token="ann" * 6)
            self.assertIn("353 bob = #tea :bob", "\n".join(self.tried(bob, "#tea")))
            bob.send("PART #tea\r\n")  # coming first once more does not help
            self.assertIn("353 bob = #tea :bob", "\n".join(self.tried(bob, "#tea")))
            self.assertIn("353 ann = #tea :bob @ann", "\n".join(self.tried(ann, "#tea")))  # uninvited
            self.assertEqual(bob.until(" MODE "), ":chat.local MODE #tea +o :ann")
            self.assertIn("353 bob = #cup :@bob", "\n".join(self.tried(bob, "#cup")))  # it had ended
            bob.send("PART #cup\r\n")
            bob.sync()
        ann.send("PART #tea\r\n")
        ann.sync()
        self.assertNotIn("@", "\n".join(self.tried(ann, "#tea")))  # whoever leaves has left that, too
        bob.send("PART #tea\r\n")
        bob.sync()
        ann.send("PART #tea\r\n")
        ann.sync()
        self.assertIn(":@bob", "\n".join(self.tried(bob, "#tea")))

    def test_a_channel_whose_operator_does_not_come_back_begins_anew(self) -> None:
        ann = self.someone("ann")
        ann.send("JOIN #tea\r\n")
        ann.sync()
        self.restart()
        for waiting, told in ((chat.OPERATORS_S, ":bob"), (-1, ":@bob")):
            with mock.patch.object(chat, "OPERATORS_S", waiting):
                bob = self.someone("bob")
                self.tried(bob, "#tea")
                bob.send("PART #tea\r\n")
                bob.sync()
                self.assertIn(told, "\n".join(self.tried(bob, "#tea")))
                bob.send("QUIT\r\n")
                bob.rest()

    def test_what_everybody_could_read_stays_when_a_channel_was_closed_for_a_while(self) -> None:
        for modes in ("+k cup", "+i"):
            ann = self.someone("ann", *self.CAPS)
            ann.send(f"JOIN #tea\r\nPRIVMSG #tea :open\r\nMODE #tea {modes}\r\nPRIVMSG #tea :psst\r\n")
            ann.send("MODE #tea -ki\r\nPRIVMSG #tea :again\r\nCHATHISTORY LATEST #tea * 10\r\n")
            told = [line.rpartition(":")[2] for line in ann.sync() if "PRIVMSG" in line]
            self.assertEqual(told, ["open", "again"])
            ann.send("PART #tea\r\n")
            ann.sync()
            told = [line.rpartition(":")[2] for line in self.tried(self.someone("eve"), "#tea") if "PRIVMSG" in line]
            self.assertEqual(told, ["open", "again"])
            self.restart(False)

    def test_nobody_reads_what_was_said_by_the_invited(self) -> None:
        ann = self.someone("ann")
        ann.send("JOIN #tea\r\nMODE #tea +i\r\nTOPIC #tea :secret\r\nPRIVMSG #tea :secret\r\n")
        ann.sync()
        self.restart()
        eve, ann = self.someone("eve"), self.someone("ann")
        told = "\n".join(self.tried(eve, "#tea"))  # nobody is there who could invite
        self.assertIn(":eve", told)
        self.assertNotIn("secret", told)
        self.assertIn("473 ann #tea", self.tried(ann, "#tea")[0])

    def test_nothing_is_shown_while_it_cannot_be_stored_that_it_must_not_be(self) -> None:
        ann = self.someone("ann")
        ann.send("JOIN #tea\r\nMODE #tea +k cup\r\nPRIVMSG #tea :psst\r\n")
        ann.sync()
        other = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        self.addCleanup(other.close)
        with mock.patch.object(chat, "STORE_S", 0.01), self.logs() as caught:
            self.server.hub.history._rows("PRAGMA busy_timeout = 10")  # type: ignore[attr-defined]
            other.execute("BEGIN IMMEDIATE")
            ann.send("PART #tea\r\n")
            ann.sync()
            told = self.tried(self.someone("eve"), "#tea")
            self.assertNotIn("psst", "\n".join(told))
            other.execute("ROLLBACK")
            self.eventually(lambda: not self.server.hub.unsaved, "it was not tried again")
        self.assertEqual([text.split()[0] for text in caught if not text.startswith("INFO")], ["ERROR", "WARNING"])
        self.assertNotIn("psst", "\n".join(self.tried(self.someone("cat"), "#tea")))


LONG = bool(os.environ.get("CHAT_TEST_LONG"))


def seeds(count: int) -> Iterator[int]:
    """What a fuzzer runs with: the same few; others each time in long runs; or only CHAT_TEST_SEED."""
    start = random.randrange(1 << 32) if LONG else 0
    only = os.environ.get("CHAT_TEST_SEED")
    yield from [int(only)] if only else range(start, start + count)


@contextlib.contextmanager
def repeatable(seed: int) -> Iterator[random.Random]:
    """Whatever fails within names the seed that makes it fail again."""
    try:
        yield random.Random(seed)
    except Exception as error:
        raise AssertionError(f"CHAT_TEST_SEED={seed}: {error!r}") from error


class Soup:
    """What clients and servers send, and what they never should: generated, bent and broken."""

    USUAL = """#chat #CHAT #a #b,#chat,#a #x,ann,u1 ann bob u1 u2 U3 José Борис 美咲 guest1 * 0 1 -1 50 1000 , + - : ::
        +o -o+b +kl %tcuihsnfdlaor,1 % = {} {0} {nick} {text} %s *** \\ \\: [ " ' / // /me /msg /nick /quit exit
        chat.local ann!ann@localhost bob!b@h *!*@* LS ACK NAK REQ END 302 LATEST BEFORE AFTER AROUND BETWEEN TARGETS
        msgid=1 msgid=fffffffffffffff timestamp=2026-01-31T12:00:00.000Z timestamp=9999-12-31T23:59:59.999Z +1 -1
        chathistory labeled-response PRIVMSG INVALID_UTF8 CHATHISTORY @bob +bob,ann @+ @#chat
        +#a,@#chat +eI +sC +B-i !#*,>0 C<9,*a* +b-eI draft/multiline 1"""
    WORDS = [
        *USUAL.split(),
        *("", " ", "\x01ACTION waves\x01", "\x01ACTION ", "\x01", "\x1b]0;x\x07", "\x1b[5m", "\x9b6n", "\x07", "\x7f"),
        *("\0", "\r", "\t", "\u202e", "\u200b", "\u3164", "\ufeff", "\u2028", "\x85", "\xa0", "\ud800", "e\u0301"),
        *("\u0301" * 20, "😀", "\ufdfa", "9" * 30, "1e9", "a" + "9" * 23, "9" * 5000, "é" * 200, "美" * 150, "y" * 505),
    ]
    TAGS = ["time", "msgid", "batch", "label", "+typing", chat.ID_TAG, chat.BY_TAG, chat.REPLAYED_TAG, chat.COUNT_TAG,
            chat.CONCAT_TAG, chat.LINES_TAG]  # fmt: skip
    NUMERICS = [*chat.NUMERICS, "464", "465", "471", "473", "999", "FAIL", "ERROR", "BATCH", "PONG", "ACK", "CHGHOST"]
    OFTEN = ["PRIVMSG", "PRIVMSG", "PRIVMSG", "JOIN", "NICK", "NOTICE"]
    ARRIVING = ["001", "433", "CAP", "BATCH", "353", "QUIT", "KICK"]

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.commands = [*(name for name in chat.COMMANDS if name != "QUIT"), *self.OFTEN * 3]

    def word(self) -> str:
        if self.rng.random() < 0.05:
            return "".join(chr(self.rng.randrange(0x11000)) for _ in range(self.rng.randrange(6)))
        return self.rng.choice(self.WORDS)

    def text(self) -> str:
        return " ".join(self.word() for _ in range(self.rng.choice((0, 1, 1, 2, 3, 5))))

    def tags(self) -> dict[str, str]:
        return {self.rng.choice(self.TAGS): self.word() for _ in range(self.rng.choice((0, 0, 0, 1, 1, 2, 4)))}

    def message(self, commands: Sequence[str], sources: Sequence[str] = ("",)) -> Message:
        """A message that could be meant."""
        words = [self.word() for _ in range(self.rng.choice((0, 1, 1, 1, 2, 2, 3, 15)))]
        words = [word for word in words if word and word[0] != ":" and not set(word) & set(" \0\r")]
        last = [self.text()] if self.rng.random() < 0.7 else []
        return Message(self.rng.choice(commands), (*words, *last), self.rng.choice(sources), self.tags())

    def irc(self) -> str:
        return chat.format_tagged(self.message(self.commands))

    def from_server(self) -> str:
        sources = ["s", "chat.local", "", "bob!b@h", "ann!a@b", f"{self.word()}!a@b", "bob!" + "h" * 300]
        return chat.format_tagged(self.message([*self.commands, *self.NUMERICS, *self.ARRIVING * 3], sources))

    def json(self) -> str:
        kinds = ("chat", "chat", "chat", "command", "private", "join", "history", "ping", "odd", 1, None)
        item: dict[str, Any] = {"type": self.rng.choice(kinds)}
        for key in ("text", "text", "to", "ref", "user", "channel", "odd", "after", "token", "replay"):
            if self.rng.random() < 0.5:
                item[key] = self.rng.choice((*[self.text()] * 20, None, 1, [], {"a": [{}]}, 1e400))
        if item["type"] == "command":
            item["text"] = self.plain()
        return json.dumps(item, ensure_ascii=self.rng.random() < 0.5)

    def plain(self) -> str:
        slash = f"/{self.rng.choice(sorted(set(chat.SLASH_COMMANDS) - {'quit'}))} " if self.rng.random() < 0.4 else ""
        return slash + self.text()

    def line(self, kinds: Sequence[Callable[[], str]]) -> bytes:
        """A line without its end, sometimes damaged."""
        data = self.rng.choice(kinds)().encode(errors="surrogatepass")
        return (data if self.rng.random() < 0.8 else self.damaged(data)).replace(b"\n", b"")

    def frames(self, line: bytes) -> bytes:
        """A line as a WebSocket message, in one frame or in pieces with pings between them."""
        kind, cuts = self.rng.choice((chat.WS_TEXT, chat.WS_TEXT, chat.WS_BINARY)), self.rng.choice((0, 0, 0, 1, 3))
        at = [0, *sorted(self.rng.randrange(len(line) + 1) for _ in range(cuts)), len(line)]
        found = b""
        for number, (start, end) in enumerate(zip(at, at[1:])):
            found += masked(line[start:end], chat.WS_MORE if number else kind, 0x80 * (number == cuts))
            found += masked(self.rng.choice((b"", b"x" * 125)), chat.WS_PING) * self.rng.choice((0, 0, 1))
        return found

    def damaged(self, data: bytes) -> bytes:
        start = self.rng.randrange(len(data) + 1)
        end = start + self.rng.randrange(8)
        noise = bytes(self.rng.randrange(256) for _ in range(self.rng.randrange(4)))
        kind = self.rng.randrange(4)
        if kind == 0:
            return data[:start] + noise + data[end:]
        if kind == 1:
            return data[:start]
        if kind == 2:
            return data[:start] + data[start:end] * self.rng.choice((2, 50, 1000)) + data[end:]
        return bytes(self.rng.randrange(256) for _ in range(self.rng.randrange(60)))


def obeyed(char: str) -> bool:
    """Whether a terminal may do something else with a character than show it."""
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") or char == "\u3164"


def unframed(data: bytes, end: str) -> bytes:
    """The lines in what was sent by a WebSocket."""
    data, lines = re.sub(rb"^HTTP/1.1 101 .*?\r\n\r\n", b"", data, flags=re.DOTALL), b""
    while data:
        at = {126: 4, 127: 10}.get(data[1], 2)
        size = int.from_bytes(data[2:at], "big") or data[1]
        if data[0] & 15 < chat.WS_CLOSE:
            lines += data[at : at + size] + end.encode()
        data = data[at + size :]
    return lines


def flaw(view: chat.Dialect, data: bytes) -> str:
    """What is wrong with whole lines that the server sent to somebody who speaks so; '' where nothing is."""
    if isinstance(view, chat.Framed):
        return flaw(view.dialect, unframed(data, view.dialect.end))
    data = re.sub(rb"^Enter your name: (\r?\n)?", b"", data)  # answers an empty line where browsers come from
    if isinstance(view, chat.Plain):
        data = re.sub(b"\xff[\xfc\xfe].", b"", data, flags=re.DOTALL)  # WONT and DONT
        data = data.replace(b"*** Yes, the chat is here\r\n", b"")
    try:
        *lines, rest = data.decode().split(view.end)
        if isinstance(view, chat.Http):
            return ""
        return "an end is missing" if rest else next(filter(None, (flaw_in_line(view, line) for line in lines)), "")
    except ValueError as error:  # no UTF-8, or no JSON
        return str(error)


def flaw_in_line(view: chat.Dialect, line: str) -> str:
    if set(line) & set("\0\r\n") or not line:
        return "empty, or a line end in the middle"
    if view is chat.JSON:
        return (
            "" if json.loads(line)["type"] in ("chat", "private", "system", "error", "ack", "pong") else "an odd type"
        )
    if not isinstance(view, chat.Irc):
        return "obeyed, or hidden" if any(map(obeyed, line)) else ""
    bare, message = line.partition(" ")[2] if line.startswith("@") else line, chat.parse(line)
    if len(bare.encode()) > chat.LINE_BYTES - 2:
        return "too long"
    if not re.fullmatch("[A-Z]+|[0-9]{3}", message.command):
        return "an odd command"
    if not message.source and message.command not in ("PING", "ERROR"):
        return "no source"
    caps = {chat.TAG_CAPS.get(tag, "message-tags") for tag in message.tags}
    return "" if caps <= view.caps else "tags that were not asked for"


class Fuzz(unittest.TestCase):
    """Generated lines at everything that parses."""

    VIEWS = [chat.PLAIN, chat.JSON, chat.irc(), chat.irc(frozenset(chat.CAPABILITIES))]

    def test_what_is_wrong_is_found(self) -> None:
        for view, data, wrong in (
            (chat.irc(), b":s 001 a :x\r\nPING :s\r\n", False),
            (chat.irc(), b":s 001 a :" + b"x" * 500 + b"\r\n", False),
            (chat.irc(), b":s 001 a :" + b"x" * 501 + b"\r\n", True), (chat.irc(), b":s 001 a :\xff\r\n", True),
            (chat.irc(), b":s 001 a :x\n", True), (chat.irc(), b":s 001 a :x\ry\r\n", True),
            (chat.irc(), b":s 001 a :x\0\r\n", True), (chat.irc(), b":s 001 a :x\r\n\r\n", True),
            (chat.irc(), b"PRIVMSG #chat :x\r\n", True), (chat.irc(), b"@time=x :a!b@c PRIVMSG #chat :x\r\n", True),
            (chat.irc(frozenset({"server-time"})), b"@time=x :a!b@c PRIVMSG #chat :x\r\n", False),
            (chat.PLAIN, "bob: é\n".encode(), False), (chat.PLAIN, b"bob: \x1b[m\n", True),
            (chat.PLAIN, "bob: \u202e\n".encode(), True), (chat.PLAIN, "bob: \u3164\n".encode(), True),
            (chat.JSON, b'{"type": "chat"}\n', False), (chat.JSON, b'{"type": "chat"\n', True),
        ):  # fmt: skip
            with self.subTest(data):
                self.assertEqual(bool(flaw(view, data)), wrong)

    def test_frames(self) -> None:
        """Messages are found however they are cut, and nonsense ends them in the same way."""
        for seed in seeds(20000 if LONG else 40):
            with repeatable(seed) as rng:
                soup = Soup(rng)
                lines = [soup.line([soup.irc, soup.json])[:4000] for _ in range(50)]
                good = b"".join(map(soup.frames, lines))
                bad = soup.damaged(good) + masked(b"\x03\xe8", chat.WS_CLOSE)
                for data in (good, bad, rng.choice((b"", good)) + bad[rng.randrange(len(bad)) :]):
                    whole, cut = self.web_socket(), self.web_socket()
                    told, start, pieces = whole.feed(data), 0, []
                    while start < len(data):
                        end = start + rng.choice((1, 2, 5, 1000))
                        pieces.append(cut.feed(data[start:end]))
                        start = end
                    self.assertEqual((told, whole.pongs), (b"".join(pieces), cut.pongs))
                    self.assertEqual(whole.closing, cut.closing)
                    self.assertRegex(
                        whole.closing[2:4], b"^(|\x03[\xe8\xea\xef\xf1])$" if data is not good else b"^(|\x03\xef)$"
                    )
                    if data is good and not whole.closing:
                        self.assertEqual(told, b"".join(line.rstrip(b"\r") + b"\n" for line in lines))

    @staticmethod
    def web_socket() -> chat.WebSocket:
        return chat.WebSocket(mock.Mock(), chat.CLIENT_INPUT_BYTES, mock.Mock())

    def test_requests(self) -> None:
        """Whatever is asked, there is an answer."""
        for seed in seeds(20000 if LONG else 120):
            with repeatable(seed) as rng:
                soup = Soup(rng)
                start = rng.choice(
                    (WebRequests.UPGRADE.format("/", "X: y\r\n"), WebRequests.POST.format("/?a=b", 3, "", "abc"))
                )
                first, _, rest = soup.damaged(start.encode()).partition(b"\n")
                http, size = chat.Http(first), rng.choice((1, 10, 1000))
                try:
                    for at in range(0, len(rest), size):
                        http.feed(rest[at : at + size])
                    if http.request:
                        http.request.check_host(False, ())
                        http.registration(http.request)
                        http.request.handshake().decode()
                except chat.HttpError as error:
                    chat.http_answer(error.status, error.text, **error.headers)

    def test_dialects(self) -> None:
        for seed in seeds(20000 if LONG else 120):
            with repeatable(seed) as rng:
                soup = Soup(rng)
                for _ in range(50):
                    self.decode_and_encode(soup.line([soup.irc, soup.json, soup.plain, soup.from_server]), rng)

    def decode_and_encode(self, line: bytes, rng: random.Random) -> None:
        chat.dialect_of(line)
        for view in (*self.VIEWS[:2], chat.Http(), self.VIEWS[rng.randrange(2, 4)]):
            try:
                messages = view.decode(line, rng.random() < 0.7)
            except chat.CommandError as refused:
                refused.numeric.text.format(*refused.params)
                continue
            for message in messages:
                self.assertFalse(set("".join(message.params)) & set("\0\r\n"), message)
                "".join(message.params).encode()
                if message.command in chat.COMMANDS:
                    self.seen_by_all(message._replace(source="bob!bob@host"), view)

    def seen_by_all(self, message: Message, origin: chat.Dialect) -> None:
        """What others may be sent of a message, however it came."""
        if isinstance(origin, chat.Irc):
            bare = message._replace(tags=chat.NO_TAGS)
            self.assertEqual(chat.parse(chat.format_line(bare)), bare)
            self.assertEqual(chat.parse(chat.format_tagged(message)).tags, message.tags)
        try:
            chat.check_length(message)
        except chat.CommandError:
            return
        for view in self.VIEWS:
            found = flaw(view, view.encode(message))
            if found != "too long" or isinstance(origin, chat.Irc):
                self.assertEqual(found, "", (view, message))

    def test_text_form(self) -> None:
        for seed in seeds(4000 if LONG else 40):
            with repeatable(seed) as rng:
                soup = Soup(rng)
                for _ in range(50):
                    message = chat.parse(soup.line([soup.from_server]).decode(errors="replace"))
                    shown = chat.text_form(message)
                    self.assertEqual(flaw(chat.PLAIN, f"{shown}\n".encode()) if shown else "", "", message)
                    if not chat.is_system(message):
                        self.assertFalse(shown.startswith("*** "), message)
                    item = chat.JSON.encode(message)
                    self.assertLessEqual(item.count(b"\n"), 1)

    def test_slash_commands_and_names(self) -> None:
        for seed in seeds(4000 if LONG else 40):
            with repeatable(seed) as rng:
                soup = Soup(rng)
                for _ in range(50):
                    with contextlib.suppress(chat.CommandError):
                        self.assertTrue(chat.parse_input(soup.plain(), "#x", rng.random() < 0.5).command)
                    self.names(soup.word())
                    with contextlib.suppress(ValueError):
                        low, high = chat.parse_reference(soup.word())
                        self.assertLessEqual(low, high)

    def names(self, word: str) -> None:
        with contextlib.suppress(chat.CommandError):
            channel = chat.check_channel(word)
            self.assertEqual(chat.check_channel(channel), channel)
        try:
            nick = chat.check_nick(word)
        except chat.CommandError:
            return
        self.assertEqual((chat.check_nick(nick), chat.fold(chat.fold(nick))), (nick, chat.fold(nick)))
        self.assertNotEqual(chat.fold(chat.check_nick(chat.next_nick(nick))), chat.fold(nick))

    def test_lines_however_they_are_cut(self) -> None:
        for seed in seeds(20000 if LONG else 500):
            with repeatable(seed) as rng:
                limit = rng.randrange(1, 12)
                data = bytes(rng.choices(b"ab\r\n", (5, 1, 1, 2), k=rng.randrange(60)))
                buffer, found, at = chat.LineBuffer(limit), [], 0
                empty = len(pickle.dumps(buffer))
                while at < len(data):
                    size = rng.randrange(1, 20)
                    found += buffer.feed(data[at : at + size])
                    at += size
                    self.assertLessEqual(len(pickle.dumps(buffer)), empty + limit + SLACK)
                *lines, rest = data.split(b"\n")
                wanted = [line.rstrip(b"\r") if len(line) <= limit else None for line in lines]
                wanted += [None] if len(rest) > limit else []
                self.assertEqual(found, [line for line in wanted if line != b""], data)
                self.assertEqual(buffer.end(), rest.rstrip(b"\r") if len(rest) <= limit else b"", data)


class Disturber:
    """A connection that sends what it was given as fast as it is taken, reads or does not, and ends in its own way."""

    def __init__(self, port: int, rng: random.Random, data: bytes, end: str, reads: bool = True) -> None:
        self.sock = socket.socket()
        if not reads:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setblocking(False)
        self.rng, self.data, self.end = rng, data or b"\n", end
        self.reads = reads or end == "half"

    @staticmethod
    def pump(disturbers: list[Disturber]) -> None:
        """Lets those who can send and read; takes out those who have done."""
        reading = [one for one in disturbers if one.reads]
        writing = [one for one in disturbers if one.data]
        readable: list[Disturber] = []
        writable: list[Disturber] = []
        if reading or writing:  # Windows refuses to wait for nothing
            readable, writable, _ = select.select(reading, writing, [], 0.05)
        for one in disturbers[:]:
            try:
                if one in writable:
                    one.data = one.data[one.sock.send(one.data[: one.rng.choice((1, 100, 5000, 1 << 16))]) :]
                    if not one.data and one.end == "half":
                        one.sock.shutdown(socket.SHUT_WR)
                over = one in readable and not one.sock.recv(1 << 16)
            except BlockingIOError:
                continue
            except OSError:
                over = True
            stays = one.end == "half" or one.end == "stays" and one.rng.random() < 0.8
            if over or not one.data and not stays:
                one.close()
                disturbers.remove(one)

    def fileno(self) -> int:
        return self.sock.fileno()

    def close(self) -> None:
        if self.end == "reset":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class FuzzServer(ServerCase):
    """Generated lines, whole and broken, from many who come, stall and vanish, while four only want to talk."""

    LINES = 1_000_000 if LONG else 6_000
    TOLERANCE = 8 << 10  # KiB of memory in the second half
    SPEAK = (["echo-message"], chat.CAPABILITIES)  # how ann and bob do
    VIEWS = (*(chat.irc(frozenset(caps)) for caps in SPEAK), chat.PLAIN, chat.JSON)
    CHANNELS = ("#a", "#b", "#c")
    # How a visit begins in each dialect, how something is said, and what else is done:
    # {0} name, {1} text, {2} channel, {3} capabilities.
    DIALECTS: list[tuple[str, str, list[str]]] = [
        ("{0}", "{1}", ["/who", "/join {2}", "/nick {0}x", "/topic {1}", "/msg ann {1}", "/away", "/whois bob", "/"]),
        (
            '{{"type": "join", "user": "{0}"}}',
            '{{"type": "chat", "text": "{1}", "ref": "1"}}',
            ['{{"type": "command", "text": "/join {2}"}}', '{{"type": "private", "to": "bob", "text": "{1}"}}', "{{"],
        ),
        (
            "CAP REQ :{3}\nNICK {0}\nUSER {0} 0 * :{0}\nCAP END\nJOIN #chat",
            "PRIVMSG #chat :{1}",
            ["WHO #chat", "LIST", "JOIN {2}", "PART {2}", "NICK {0}x", "PRIVMSG ann :{1}", "TOPIC {2} :{1}", "X",
             "NAMES #chat", "WHOIS bob", "CHATHISTORY LATEST #chat * 50", "PRIVMSG {2} :{1}", "AWAY :{1}",
             "BATCH +1 draft/multiline #chat\n@batch=1 PRIVMSG #chat :{1}\n@batch=1 PRIVMSG #chat :{1}\nBATCH -1"],
        ),
    ]  # fmt: skip

    def setUp(self) -> None:
        self.flaws: list[str] = []
        self.handled = itertools.count()
        for patch in (
            mock.patch.multiple(chat, ERROR_PAUSE_S=0.0, RESUME_GRACE_S=0.05, PROMPT_S=60.0, MAX_RESUMABLE=3),
            mock.patch.multiple(chat, LOG_HIGH_WATER=20, LOG_ENTRIES=500),  # so that they are reached
            mock.patch.multiple(chat, FanOut=self.checked, handle_line=self.counted),
        ):
            patch.start()
            self.addCleanup(patch.stop)
        super().setUp()
        self.limit(outbox=1 << 18, per_address=math.inf, rate=math.inf)
        self.exempt("")  # so that they are counted
        self.said = 0
        irc = [self.irc(name, *caps) for name, caps in zip(("ann", "bob"), self.SPEAK)]
        self.witnesses = [*irc, self.plain("pat"), self.peer('{"type":"join","user":"jon"}\n')]
        self.ann = self.witnesses[0]  # an operator, whom nobody can throw out
        self.witnesses[-1].until("jon joined")
        for witness in irc:
            witness.sync()
        for witness in self.witnesses:
            witness.seen = []

    def checked(self, effects: list[chat.Effect], fan_out: Any = chat.FanOut) -> Any:
        """All that is sent to anybody passes here."""
        payloads = list(fan_out(effects).payloads())
        for data, sessions, _ in payloads:
            for dialect in {session.output for session in sessions} if data else ():
                found = flaw(dialect, data)
                if found:
                    self.flaws.append(f"{found}: {data[:1000]!r}")
        return mock.Mock(payloads=lambda: payloads)

    def counted(self, *args: Any, handle_line: Any = chat.handle_line) -> None:
        next(self.handled)
        handle_line(*args)

    def talk(self) -> None:
        """Ann and bob say some words; all four see them once, in one order, and nothing that they see is damaged."""
        words = [[f"word {self.said + number} of {name}" for number in range(3)] for name in ("ann", "bob")]
        for speaker, own in zip(self.witnesses, words):
            speaker.send("".join(f"PRIVMSG #chat :{word}\r\n" for word in own))
        ours = re.compile(r'(@\S+ )?:(ann|bob)!|(ann|bob): |\{"type": "chat", "user": "(ann|bob)"')
        told, word = [], r"word \d+ of \w+"
        for witness, view in zip(self.witnesses, self.VIEWS):
            unseen = {*words[0], *words[1]}
            while unseen:
                unseen.difference_update(re.findall(word, witness.until("word ")))
            self.assertEqual({flaw_in_line(view, line) for line in witness.seen}, {""})
            told.append([re.findall(word, line) for line in witness.seen if ours.match(line)])
        self.assertEqual(told, told[:1] * 4)
        for own in words:
            self.assertEqual([found for found in told[0] if not set(found).isdisjoint(own)], [[text] for text in own])
        self.assertEqual(len(told[0]), 6)
        said = [[m for m in map(chat.parse, peer.seen) if m.command == "PRIVMSG"] for peer in self.witnesses[:2]]
        self.assertEqual(*([(m.source, m.params) for m in seen if m.params[0].lower() == "#chat"] for seen in said))
        for witness in self.witnesses:
            witness.seen = []
        self.said += 3

    def fool(self, rng: random.Random) -> Disturber:
        """Somebody who says who they are, more or less, and then talks much nonsense."""
        soup, name = Soup(rng), rng.choice(("u1", "u2", "U3", "ann", "Борис"))
        caps = " ".join(rng.sample(chat.CAPABILITIES, rng.randrange(len(chat.CAPABILITIES))))
        resume = f"CAP REQ :{chat.RESUME_CAP}\nRESUME {name * 16}\n" if rng.random() < 0.3 else ""
        start, kinds = rng.choice((
            (f"CAP REQ :{caps}\n{resume}NICK {name}\nUSER {name} 0 * :x\nCAP END\nJOIN #chat\n", [soup.irc]),
            (f"NICK {name}\nUSER u 0 * :\u202e\nJOIN #chat,#a\n", [soup.irc, soup.irc, soup.from_server]),
            (f"{name}\n", [soup.plain]),
            (json.dumps({"type": "join", "user": rng.choice((name, ""))}) + "\n", [soup.json]),
            (f"NICK {name}\n", [soup.from_server]),
            ("", [soup.irc, soup.json, soup.plain, soup.from_server]),
            (rng.choice(("GET / HTTP/1.0\r\n", "\x16\x03\x01")), [soup.plain]),
            (f"POST /?name={name} HTTP/1.0\nContent-Length: {rng.randrange(999)}\n\n", [soup.plain]),
        ))  # fmt: skip
        end = rng.choice((b"\n", b"\r\n"))
        lines = [soup.line(kinds) for _ in range(rng.randrange(200))]
        data = start.encode() + end.join(lines)
        if rng.random() < 0.3:
            data = b"".join(map(soup.frames, [*start.encode().splitlines(), *lines]))
            data = b"".join([WebRequests.UPGRADE.format("/", "").encode(), data])
        if rng.random() < 0.5:
            data = data[: rng.randrange(len(data) + 1)]
        return Disturber(self.port, rng, data, rng.choice(("close", "reset", "half")), rng.random() < 0.7)

    def visitor(self, rng: random.Random) -> Disturber:
        """Somebody who makes sense, but floods, does not read, says nothing, or stays on without a word."""
        begin, say, others = rng.choice(self.DIALECTS)
        caps = " ".join(rng.sample(chat.CAPABILITIES, 5)).replace(chat.RESUME_CAP, "batch")
        name, most = f"u{rng.randrange(1 << 32):x}", rng.choices((20, 500, 100, 0), (10, 3, 1, 1))[0]
        floods, stalls = most == 500, most == 100
        lines = [begin] * (most > 0)
        lines += [rng.choice([say] if floods else [say, *others]) for _ in range(rng.randrange(most + 1))]
        words = [rng.choice(("é", "x", "你")) + "y" * rng.randrange(100) for _ in lines]
        filled = [line.format(name, word, rng.choice(self.CHANNELS), caps) for line, word in zip(lines, words)]
        data = "".join(f"{line}\n" for line in filled).encode()
        end = "stays" if stalls or rng.random() < 0.05 else rng.choice(("close", "reset", "half"))
        return Disturber(self.port, rng, data[: rng.choice((None, -3))], end, not stalls)

    def round(self, rng: random.Random) -> None:
        disturbers = [rng.choice((self.fool, self.visitor))(rng) for _ in range(12)]
        try:
            while disturbers:
                Disturber.pump(disturbers)
                if rng.random() < 0.05:
                    self.talk()
        finally:
            for disturber in disturbers:
                disturber.close()
        self.talk()

    def left(self) -> list[Any]:
        """What of others is still there, as ann is told, and as the process shows."""
        counts = self.counts(self.ann)
        self.ann.send("NAMES #chat\r\nLIST\r\n")
        told = "\n".join(self.ann.sync())
        names = {name.lstrip("@+") for line in re.findall(" 353 ann . #chat :(.*)", told) for name in line.split()}
        found = (counts, names, re.findall(r" 322 ann (\S+ \d+)", told), self.connections(), self.held())
        wanted = ((4, 0, 1), {"ann", "bob", "pat", "jon"}, ["#chat 4"], 4, self.held_at_first)
        return [pair for pair in zip(found, wanted) if pair[0] != pair[1]]

    @staticmethod
    def held() -> tuple[int, int]:
        """Threads and descriptors of this process."""
        return threading.active_count(), len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0

    @staticmethod
    def memory() -> int:
        """KiB of memory of this process."""
        if sys.platform != "linux":
            return 0
        status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0])

    def test_a_server_under_nonsense(self) -> None:
        self.talk()
        gc.collect()  # what earlier tests in this process left is closed now, not meanwhile
        self.held_at_first = self.held()
        count = half = 0
        defects: list[str] = []

        def log_later(level: int, text: str, *values: object) -> None:
            if level == logging.ERROR:
                defects.append(text % values)

        with mock.patch.object(chat, "log_later", log_later):
            for seed in seeds(1 << 30):
                with repeatable(seed) as rng:
                    self.round(rng)
                    self.eventually(lambda: not self.left(), "something is left")
                    self.assertEqual((self.flaws, defects), ([], []))
                count = next(self.handled)
                half = half or (count > self.LINES // 2) * self.memory()
                if count > self.LINES:
                    break
        self.assertLess(self.memory(), (half or math.inf) + self.TOLERANCE)
        self.nobody_is_counted()
        if LONG:
            print(f"{count} lines were handled, {2 * self.said} of ours; {half} KiB, {self.memory()}", file=sys.stderr)

    def nobody_is_counted(self) -> None:
        """Nobody who has left stands in the way of those who come, or lose their connection, for a limit's sake."""
        with mock.patch.object(chat, "RESUME_GRACE_S", PATIENCE):
            for number in range(chat.MAX_RESUMABLE):
                start = f"CAP REQ {chat.RESUME_CAP}\r\nRESUME {'lost' * 4}{number}\r\nNICK lost{number}\r\n"
                peer = self.peer(f"{start}USER x 0 * :x\r\nCAP END\r\n")
                peer.until(" 376 ")
                peer.reset()
            self.eventually(lambda: self.connections() == 4, "the loss was not noticed")
            self.assertEqual(self.counts(self.ann)[0], 4 + chat.MAX_RESUMABLE)
        self.limit(per_address=5)
        self.peer("NICK fifth\r\nUSER x 0 * :x\r\n").until(" 001 ")
        self.assertEqual(self.peer().rest(), ["ERROR :Too many connections from your address"])


LEFT, RIGHT, UP, DOWN, DELETE = "\x1b[D", "\x1b[C", "\x1b[A", "\x1b[B", "\x1b[3~"


class LineEditing(unittest.TestCase):
    """Keys in, text and cursor out."""

    def editor(self) -> chat.LineEditor:
        return chat.LineEditor(lambda head: (0, []))

    def press(self, editor: chat.LineEditor, keys: str) -> list[str]:
        entered = [editor.handle_key(key) for key in chat.KeyParser().feed(keys)]
        return [line for item in entered if item for line in item.lines]

    def test_keys(self) -> None:
        for text, keys in (
            ("aé你", ["a", "é", "你"]), ("\x1b[A\x1bOD\x1bb\x01", ["\x1b[A", "\x1bOD", "\x1bb", "\x01"]),
            ("\x1b[1;5C\x1b[3~x", ["\x1b[1;5C", "\x1b[3~", "x"]), ("\x1b\x1b[A", ["\x1b", "\x1b[A"]),
            ("\x1b[\rx\x1b[é", ["\x1b[", "\r", "x", "\x1b[", "é"]),  # begun, but no such key
            ("abc\x1b\r", ["a", "b", "c", "\x1b", "\r"]),
            ("\x1b[200~a\r\x1b[Ab\x1b[201~c", ["\x1b[200~a\r\x1b[Ab\x1b[201~", "c"]),
            ("\x1b[[Ax\x1b[[\r", ["\x1b[[A", "x", "\x1b[[", "\r"]),  # a function key of the Linux console
            ("\x1bO5Ax\x1bO\rx", ["\x1bO5A", "x", "\x1bO", "\r", "x"]),
            ("\x1b[3$x\x1b[4;2$yx", ["\x1b[3$", "x", "\x1b[4;2$y", "x"]),  # Shift-Delete of rxvt; DECRPM
            ("\x1b[M !!x\x1b[<0;1;1Mx", ["\x1b[M !!", "x", "\x1b[<0;1;1M", "x"]),  # mice
            ("\x1b[ 1ax", ["\x1b[ 1a", "x"]),  # no such sequence: ends where one would
            ("\x1b]11;rgb:0/é\x07x\x1bP1$r0m\x1b\\y", ["x", "y"]),  # answers of the terminal
            ("\x1b_a\x1b\\x\x1b^b\x1b\\y\x1bXc\x07z", ["x", "y", "z"]),
            ("\x1b]x\ry\x1b]x\x7fy\x1bPx\x1b[A", ["\r", "y", "\x7f", "y", "\x1b[A"]),  # Alt-] and Alt-P, typed
            ("\x1b]" + "x" * chat.ANSWER_CHARS + "yz", ["y", "z"]),
        ):  # fmt: skip
            with self.subTest(text):
                self.assertEqual(chat.KeyParser().feed(text), keys)
                single = chat.KeyParser()
                self.assertEqual([key for char in text for key in single.feed(char)], keys)

    def test_a_paste_that_is_too_long_is_not_taken(self) -> None:
        with mock.patch.object(chat, "PASTE_CHARS", 1 << 12):
            for size in (1, 7, 1000, chat.PASTE_CHARS * 2):
                keys = chat.KeyParser()
                text = "\x1b[200~" + "line\r" * (chat.PASTE_CHARS // 2) + "\x1b[201~a"
                found = [key for at in range(0, len(text), size) for key in keys.feed(text[at : at + size])]
                if size < chat.PASTE_CHARS:
                    self.assertEqual(found, [chat.PASTE_BEGIN, "a"])
                self.assertEqual(keys.feed("\x1b[A"), ["\x1b[A"])

    def test_editing(self) -> None:
        for keys, shown in (
            ("hello", "hello|"), ("hello" + LEFT * 2, "hel|lo"), ("hello" + LEFT * 9 + RIGHT, "h|ello"),
            ("hello\x02\x02\x06", "hell|o"), ("hello\x01X\x05Y", "XhelloY|"), ("hello\x1b[HX\x1b[FY", "XhelloY|"),
            ("hello\x7f\x08", "hel|"), ("\x7fa" + LEFT + "\x7f", "|a"), ("hello\x01" + DELETE + "\x04", "|llo"),
            ("e\u0301x" + LEFT * 2 + DELETE, "|x"),  # marks go with their letter
            ("xe\u0301" + "\x7f", "x|"), ("x👨\u200d👩\u200d👧" + LEFT + "\x7f", "|👨\u200d👩\u200d👧"),
            ("🇩🇪🇫🇷x" + LEFT * 2 + "\x7f", "|🇫🇷x"), ("one two-three\x1bbX", "one two-X|three"),
            ("one two\x1b[1;5D\x1b[1;5D\x1b[1;5C", "one| two"), ("one two\x01\x1bf\x1bf", "one two|"),
            ("one two\x17", "one |"),
            ("one two\x17\x01\x15\x19", "two|one "),  # what kills nothing keeps what was killed
            ("one two \x17\x17\x19", "one two |"),  # kills in a row are one kill
            ("one two-three\x1b\x7f", "one two-|"), ("one two\x01\x1bd", "| two"),
            ("one two\x01\x1bd\x1bd\x19!", "one two!|"), ("one two" + LEFT * 3 + "\x0b", "one |"),
            ("one two" + LEFT * 3 + "\x15", "|two"), ("one two" + LEFT * 3 + "\x15\x05 \x19", "two one |"),
            ("a\x17b\x17\x19", "b|"), ("\x1b[99~a\x1bz\x00\x1b[200~b\tc\x1b[201~", "ab    c|"),
            ("a\x1b[[A\x1bO2P\x1b[3$\x1b[M#!!\x1b]0;t\x1b\\\x1bP>|x\x07b", "ab|"),
            ("x\x1b[200~one line\r\n\x1b[201~", "xone line|"),
        ):  # fmt: skip
            with self.subTest(keys):
                editor = self.editor()
                self.assertEqual(self.press(editor, keys), [])
                _, text, cursor = editor.view()
                self.assertEqual(f"{text[:cursor]}|{text[cursor:]}", shown)

    def test_enter_and_history(self) -> None:
        editor = self.editor()
        self.assertEqual(self.press(editor, "one\rtwo\rtwo\r   \r\r"), ["one", "two", "two"])
        for keys, text in (("draft" + UP, "two"), (UP, "one"), (UP, "one"), (DOWN * 2, "draft"), (DOWN, "draft")):
            self.press(editor, keys)
            self.assertEqual(editor.view()[1], text)
        self.assertEqual(self.press(editor, "\x15" + UP + UP + "!\r" + UP), ["one!"])
        self.assertEqual(editor.view()[1], "one!")

    def test_what_is_dropped(self) -> None:
        for keys in ("half\x03", "\x12ha\x03", "\x1b[200~a\rb\x1b[201~\x03", "one\r" + UP + "\x03"):
            editor = self.editor()
            self.press(editor, keys)
            self.assertEqual((editor.view(), editor.is_busy()), (("", "", 0), False), keys)

    def test_escape_alone_takes_no_later_letter_with_it(self) -> None:
        for pause, keys in ((0.0, ["\x1bb"]), (chat.KEY_S + 0.1, ["b"])):
            parser = chat.KeyParser()
            self.assertEqual(parser.feed("\x1b"), [])
            self.assertEqual(parser.feed("b", pause), keys)
        parser = chat.KeyParser()
        parser.feed("\x1b[200~one\r")
        self.assertEqual(parser.feed("two\x1b[201~", 9.0), ["\x1b[200~one\rtwo\x1b[201~"])  # of a slow paste

    def test_search(self) -> None:
        editor = self.editor()
        self.press(editor, "make tea\rtake coffee\rmake toast\rdraft")
        for keys, view in (
            ("\x12mak", ("search 'mak': ", "make toast", 0)), ("\x12", ("search 'mak': ", "make tea", 0)),
            ("\x7f\x7f\x7fcoff", ("search 'coff': ", "take coffee", 5)), ("\x07", ("", "draft", 5)),
        ):  # fmt: skip
            self.press(editor, keys)
            self.assertEqual(editor.view(), view)
        self.assertEqual(self.press(editor, "\x12tea\r"), ["make tea"])
        self.press(editor, "\x12no such")
        self.assertEqual(editor.view()[1], "")

    def test_completion(self) -> None:
        names = {"a": ["ann: ", "abe: "], "say a": ["ann ", "abe "], "/": ["/help "]}
        editor = chat.LineEditor(lambda head: (4 if head.startswith("say") else 0, names.get(head, [])))
        for keys, text in (
            ("a\t", "ann: "), ("\t", "abe: "), ("\t", "ann: "), ("\x1b[Z", "abe: "),
            ("hi" + LEFT * 2 + "\t", "abe: hi"), ("\x15\x0bsay a\x1b[Z", "say abe "), ("\x15/\t\t", "/help "),
            ("\x15nobody\t", "nobody"),
        ):  # fmt: skip
            self.press(editor, keys)
            self.assertEqual(editor.view()[1], text, keys)

    def test_several_pasted_lines_are_asked_about(self) -> None:
        for answer, lines in (("y", ["/quit", "", "  two", "exit"]), ("n", []), ("\r", []), ("\x1b[A", [])):
            editor = self.editor()
            self.press(editor, "typed\x1b[200~/quit\r\n\r\n  two\nexit\x1b[201~")
            for unknown in ("", "\x1b[I\x1b[1;1R\x1b[?62c"):  # which are no answer
                self.press(editor, unknown)
                self.assertEqual(editor.view(), ("send 3 pasted lines? y/n ", "", 0))
            entered = editor.handle_key(answer)
            self.assertEqual(entered or chat.Submission([]), chat.Submission(lines, bool(lines)))
            self.assertEqual(editor.view(), ("", "typed", 5))
            self.press(editor, UP)
            self.assertEqual(editor.view()[1], "typed" if lines else "exit")  # what is not sent can be called back

    def test_clear_and_leave(self) -> None:
        editor = self.editor()
        self.assertEqual((self.press(editor, "typed\x0c"), editor.view()[1]), (["/clear"], "typed"))
        self.assertEqual(self.press(editor, "\x15\x04"), ["/quit"])

    def test_help_names_every_key(self) -> None:
        finals = dict(zip("ABCDHFcdZ", ("Up", "Down", "Right", "Left", "Home", "End", "Right", "Left", "Shift-Tab")))
        tilde = {"1": "Home", "7": "Home", "4": "End", "8": "End", "3": "Delete"}
        single = {"\r": "Enter", "\n": "Enter", "\t": "Tab", "\x7f": "Backspace", "\x08": "Backspace"}
        bound = {"Ctrl-C", "Ctrl-G"}  # a signal; a key of the search
        for key in chat.BINDINGS:
            if key[:2] in ("\x1b[", "\x1bO"):
                ctrl = "Ctrl-" * (key[-1] in "cd" or ";" in key)
                bound.add(ctrl + (tilde[key[2]] if key.endswith("~") else finals[key[-1]]))
            elif key.startswith("\x1b"):
                bound.add("Alt-" + single.get(key[1:], key[1:].upper()))
            else:
                bound.add(single.get(key) or f"Ctrl-{chr(ord(key) + 64)}")
        named = re.findall(r"(?:Ctrl-|Alt-)?[A-Z][A-Za-z-]*", chat.KEY_HELP)
        self.assertEqual(set(named), bound)
        self.assertLess(max(map(len, chat.KEY_HELP.splitlines())), 80 - len("10:11 *** "))


class Rows(unittest.TestCase):
    """What a row of the screen shows of a text, and how many columns it takes."""

    def test_widths_are_the_largest_that_terminals_have(self) -> None:
        widths = list(map(chat.char_width, "aé\u0301你😀ｱ한\u1161\u200c\U000e0067"))
        self.assertEqual(widths, [1, 1, 0, 2, 2, 1, 2, 0, 0, 0])
        for text, count in (("abc", 3), ("👨\u200d👩", 4), ("❤\ufe0f", 2), ("🇩🇪", 2), ("👍🏽", 4), ("می\u200cخ", 3)):
            self.assertEqual(chat.text_width(text), count, text)

    def test_clusters(self) -> None:
        for pieces in (
            [""], ["a", "e\u0301", "你"], ["👨🏻\u200d❤\ufe0f\u200d💋\u200d👨🏼", "👩"], ["🇩🇪", "🇫🇷", "🇦", "x"],
            ["1\ufe0f\u20e3", "क्\u200dषि", "x"], ["x" + "\u0301" * 15, "\u0301" * 3],
        ):  # fmt: skip
            self.assertEqual(chat.clusters("".join(pieces)), pieces)

    def test_truncate(self) -> None:
        families = "👨\u200d👩\u200d👧" * 2
        found = [chat.truncate(text, 5) for text in ("hello", "hello!", "你好吗")]
        self.assertEqual(found, ["hello", "he...", "你..."])
        self.assertEqual([chat.truncate("abc", 2), chat.truncate(families, 10)], ["..", "👨\u200d👩\u200d👧..."])

    def test_viewport(self) -> None:
        for text, cursor, shown in (
            ("hello", 5, ("> ", "hello", "")), ("0123456789abcdefgh", 18, ("> ", "0123456789abcdefgh", "")),
            ("0123456789abcdefghi", 19, ("> ", "9abcdefghi", "")),
            ("0123456789abcdefghi", 3, ("> ", "012", "3456789abcdefgh")), ("a\x1bb", 2, ("> ", "a\\x1b", "b")),
            ("👨\u200d👩", 2, ("> ", "👨\u200d", "👩")),  # the cursor may stand where a joined emoji is
            ("a\u200db", 2, ("> ", "a<U+200D>", "b")),
        ):  # fmt: skip
            self.assertEqual(chat.viewport(["[#chat] robert> ", "> "], text, cursor, 20), shown)
        self.assertEqual(chat.viewport(["send 2 lines? y/n "], "", 0, 16), ("send 2 line...", "", ""))

    def test_wrap(self) -> None:
        men, two = "👨\u200d" * 9 + "👨", "    👨\u200d👨\u200d"
        for line, room, rows in (
            ("15:03 ann: hello", 16, ["15:03 ann: hello"]), ("", 9, [""]), ("你好", 3, ["你", " 好"]),
            ("15:03 ann: hello!", 16, ["15:03 ann:", "      hello!"]),
            ("15:03 ann: a  bc   def ghi", 16, ["15:03 ann: a  bc", "      def ghi"]),
            ("15:03 ann: 0123456789abcdef", 16, ["15:03 ann: 01234", "      56789abcde", "      f"]),
            ("15:03 ann: 你好吗你好吗你好吗", 16, ["15:03 ann: 你好", "      吗你好吗你", "      好吗"]),
            ("15:03 a: xxx👨\u200d👩e\u0301e\u0301x", 14, ["15:03 a: xxx", "      👨\u200d👩e\u0301e\u0301x"]),
            (f"15:03 {men}", 9, ["15:03 👨\u200d", two, two, two, "    👨\u200d", "    👨\u200d👨"]),
            ("15:03 a:" + " " * 20 + "x", 16, ["15:03 a:", "      x"]),
            ("15:03 a: x" + "\u3000" * 9 + "y", 13, ["15:03 a: x\u3000\u3000", "      y"]),
        ):  # fmt: skip
            with self.subTest(line):
                self.assertEqual([row.rstrip(" ") for row in chat.wrap(line, room).split("\n")], rows)

    def test_colours_go_on_in_the_next_row(self) -> None:
        line = "\x1b[2m15:03\x1b[0m \x1b[7mthe-name\x1b[0m: one two"
        rows = "\x1b[2m15:03\x1b[0m \x1b[7mthe-nam\x1b[0m\n      \x1b[7me\x1b[0m: one\n      two"
        self.assertEqual(chat.wrap(line, 13).replace(" \n", "\n"), rows)

    def test_no_text_begins_a_row(self) -> None:
        rng = random.Random(5)
        words = [*"ab .*", "15:03 ", "15:03 *** bob joined", " " * 20, "x" * 30, "你", "😀\u200d😀", "\u3000", "\u0301"]
        words += ["\x1b[31m", "\t", "\xa0" * 9, "\ufe0f", "❤\ufe0f", "می\u200cخ", "😀\u200d" * 20 + "😀", "🇩🇪"]
        for _ in range(1000):
            columns, text = rng.randrange(8, 60), "".join(rng.choices(words, k=rng.randrange(30)))
            glass, line = Glass(columns, 24), f"\x1b[2m15:02\x1b[0m ann: {chat.escape_controls(text)}"
            glass.feed(chat.wrap(line, columns - 1).replace("\n", "\r\n"))
            first, *others = glass.text().split("\n")
            self.assertTrue(first.startswith("15:02"[: columns - 1]))
            for row in others:
                self.assertRegex(row, r"^(?: {3,6}|$)", (columns, text))

    def test_row_count(self) -> None:
        texts = ["", "hello", "hello!", "你好吗", "e\u0301" * 5]
        self.assertEqual([chat.row_count(text, 5) for text in texts], [1, 1, 2, 2, 1])

    def test_what_the_terminal_cannot_show_is_counted_as_it_is_written(self) -> None:
        with mock.patch.object(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1")):
            self.assertEqual(chat.encodable("é 中"), "é \\u4e2d")

    def test_the_cursor_is_always_in_what_is_shown(self) -> None:
        rng = random.Random(4)
        for _ in range(500):
            text = "".join(rng.choice("ab 你😀\u200d\ufe0f\u0301\x1b") for _ in range(rng.randrange(60)))
            room, prompt = rng.randrange(18, 50), "[#chat 3] bob> "[rng.randrange(16) :]
            for cursor in range(len(text) + 1):
                shown, before, after = chat.viewport([prompt, "> "], text, cursor, room)
                self.assertLessEqual(chat.text_width(shown + before + after), room)
                escaped = chat.escape_chars(text)
                self.assertTrue("".join(escaped[:cursor]).endswith(before))
                self.assertTrue("".join(escaped[cursor:]).startswith(after))
                self.assertTrue(before or not cursor or not chat.char_width(text[cursor - 1]), (text, cursor, room))


class FakeTerminal(chat.Terminal):
    """A terminal that writes into a string, and of which nobody reads keys."""

    def __init__(self, client: chat.Client) -> None:
        looks = mock.patch.dict(os.environ, TERM="xterm-256color", NO_COLOR="")
        with looks, mock.patch.object(chat, "can_draw", lambda: True):
            super().__init__(client.wakeup, functools.partial(chat.completions, client))
        self.written = self.prompt = ""

    def draw(self, waiting: list[str], prompts: list[str]) -> None:
        self.prompt = prompts[0]
        super().draw(waiting, prompts)

    def _read(self) -> None:
        pass

    def _write(self, text: str) -> None:  # type: ignore[override]
        self.written += text

    def _size(self) -> os.terminal_size:  # type: ignore[override]
        return os.terminal_size((80, 24))


class Dialed:
    """The other end of a client's connection: what it sent, and what it receives. The client's loop is run by hand."""

    def __init__(self, client: chat.Client) -> None:
        self.client = client
        self.sent: list[str] = []
        self.sock: Any = None
        self._sockets: list[socket.socket] = []  # of all connections
        self._lines = chat.LineBuffer(1 << 20)
        client.dial = self._dial

    def _dial(self) -> socket.socket:
        ours, self.sock = socket.socketpair()
        for sock in (ours, self.sock):
            sock.setblocking(False)
            if sock.family == socket.AF_INET:  # without AF_UNIX it is a pair of TCP, which holds small pieces back
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets.append(sock)
        return ours

    def connect(self) -> None:
        """Lets the client connect, as it does when it is time."""
        self.client.turn(self.client.retry_at + 1)
        self._await_dialed()
        self.turn()

    def arrive(self, *lines: str) -> None:
        """Lets the client receive lines."""
        with contextlib.suppress(OSError):
            self.sock.sendall("".join(f"{line}\r\n" for line in lines).encode(errors="surrogateescape"))
        self.turn()
        while not self.client.uplink.drained and self.client.uplink.sock and self.client.status is None:
            self.turn()

    def turn(self) -> None:
        """One turn of the loop; takes what was sent."""
        self.client.turn(time.monotonic())
        self.take()

    def take(self) -> None:
        """Takes what the client has sent."""
        self.client.uplink.flush()
        with contextlib.suppress(OSError):
            while True:
                data = self.sock.recv(1 << 20)
                self.sent += [line.decode(errors="replace") for line in self._lines.feed(data) if line is not None]
                if not data:
                    break

    def close(self) -> None:
        """Ends the connection."""
        self.sock.close()
        self.turn()

    def clean_up(self) -> None:
        """Closes all sockets."""
        self._await_dialed()
        self.client.wakeup.close()
        for sock in self._sockets:
            sock.close()

    def _await_dialed(self) -> None:
        while self.client.uplink.phase == chat.Phase.DIALING and self.client.uplink.dialed is None:
            self.client.uplink.wait(1, self.client.wakeup)


AGAIN = "connect again"


class PersonCase(unittest.TestCase):
    """A client with a user interface, at a server that is played by the test. It is bob, in #chat with ann."""

    CAPS = ""
    IN = (":bob!b@h JOIN #chat", ":s 353 bob = #chat :bob ann", ":s 366 bob #chat :End")

    def setUp(self) -> None:
        self.enter(self.CAPS)

    def start(self, nick: str = "bob") -> None:
        """Makes a new client, which is not connected."""
        self.client = chat.Client("host", 1, nick, "#chat")
        self.screen = FakeTerminal(self.client)
        self.client.ui = chat.TerminalUI(self.client, self.screen)
        self.server = Dialed(self.client)
        self.addCleanup(self.server.clean_up)

    def connect(self, caps: str = "", isupport: str = "", nick: str = "bob") -> str:
        """Connects, up to the welcome; returns what is shown, and `lines` are what is sent, from then on."""
        self.server.connect()
        offer = [] if self.client.granted else [f":s CAP * LS :{caps}"]
        self.server.arrive(*offer, *([f":s CAP * ACK :{caps}"] if caps else []))
        self.lines.clear()
        tokens = [f":s 005 {nick} {isupport} :are supported"] if isupport else []
        return self.arrive(f":s 001 {nick} :Welcome", *tokens)

    def enter(self, caps: str = "", isupport: str = "") -> None:
        """Makes a new client, which connects and is let in."""
        self.start()
        self.connect(caps, isupport)
        self.arrive(*self.IN)
        self.lines.clear()

    def lose(self) -> str:
        """Loses the connection."""
        self.screen.written = ""
        self.server.close()
        return self.screen.written

    def reconnect(self, caps: str = "", isupport: str = "", nick: str = "bob") -> str:
        """Loses the connection, and connects again, up to the welcome."""
        self.lose()
        return self.connect(caps, isupport, nick)

    def arrive(self, *lines: str) -> str:
        """Returns what is shown of lines from the server."""
        self.screen.written = ""
        self.server.arrive(*lines)
        return self.screen.written

    def play(self, *steps: str) -> str:
        """Types what begins with / or >, connects again at AGAIN, lets all else arrive; returns what is shown."""
        shown = ""
        for step in steps:
            if step == AGAIN:
                shown += self.reconnect(self.CAPS)
            else:
                shown += self.type(step.lstrip(">")) if step[0] in "/>" else self.arrive(step)
        return shown

    def check(self, prompt: str, *sent: str) -> None:
        """Compares the prompt, and what was sent since it was last cleared."""
        self.assertEqual((self.prompt, self.lines), (prompt, [*sent]))

    def type(self, *lines: str) -> str:
        """Returns what is shown when lines are typed."""
        self.screen.written = ""
        for line in lines:
            self.client.enter(line, True)
        self.server.turn()
        return self.screen.written

    @property
    def lines(self) -> list[str]:
        """What the client sent."""
        self.server.take()
        return self.server.sent

    @property
    def said(self) -> list[Message]:
        """What it said."""
        return [message for message in map(chat.parse, self.lines) if message.command == "PRIVMSG"]

    @property
    def prompt(self) -> str:
        return self.screen.prompt

    def pieces(self, text: str) -> list[int]:
        """How long the pieces are in which a text is sent."""
        pieces = chat.split_message(self.client.uplink, "#chat", Message("PRIVMSG", ("#chat", text)))
        return list(map(len, pieces))

    @property
    def members(self) -> list[str]:
        room = self.client.rooms.get(self.client.rooms.active)
        return list(room.members.values()) if room else []

    @property
    def queued(self) -> list[tuple[str, str]]:
        return [(pending.target, pending.text) for pending in self.client.queue.messages]


class ForPeople(PersonCase):
    """How messages look on a terminal."""

    def test_looks(self) -> None:
        ann = chat.NAME_COLOURS[chat.zlib.crc32(b"ann") % len(chat.NAME_COLOURS)]  # type: ignore[attr-defined]
        nobody = "nobody here is called nobody"
        for line, look in (
            (":ann!a@b PRIVMSG #chat :hello bobby", f" \x1b[{ann}mann\x1b[0m: hello bobby\n"),
            (":ANN!a@b PRIVMSG #chat :same colour", f" \x1b[{ann}mANN\x1b[0m: same colour\n"),
            (":ann!a@b PRIVMSG #chat :hello BOB!", f"\x1b[1;7;{ann}mann\x1b[0m: hello BOB!\n"),
            (":ann!a@b PRIVMSG bob :psst", f"\x1b[95m[private]\x1b[0m \x1b[{ann}mann\x1b[0m: psst\n"),
            (":ann!a@b PRIVMSG #chat :\x01ACTION waves\x01", f" * \x1b[{ann}mann\x1b[0m waves\n"),
            (":ann!a@b JOIN #chat", "\x1b[2m*** ann joined\x1b[0m\n"),
            (f":s 401 bob nobody :{nobody}", f"\x1b[91m*** Error: {nobody}\x1b[0m\n"),
        ):
            with self.subTest(line):
                written = self.arrive(line)
                self.assertIn(look, written)
                self.assertEqual("\a" in written, "BOB" in line or "psst" in line)
        self.screen.colours = ()
        written = self.arrive(":ann!a@b PRIVMSG #chat :bob")
        self.assertRegex(written, r"^\r\x1b\[K\x07\d\d:\d\d ann: bob\n\[#chat 2\] bob> $")

    def test_times_and_days(self) -> None:
        self.screen.colours = ()
        now = time.time()
        clock = time.strftime("%H:%M ann: now", time.localtime(now))
        self.assertIn(clock, self.arrive(f"@time={chat.server_time(now)} :ann!a@b PRIVMSG #chat :now"))
        day = now - 7 * 86400
        written = self.arrive(f"@time={chat.server_time(day)};{chat.REPLAYED_TAG} :ann!a@b PRIVMSG #chat :old")
        self.assertIn(time.strftime("--- %A, %d %B %Y ---\n%H:%M ann: old\n", time.localtime(day)), written)
        self.assertIn(time.strftime("--- %A, %d %B %Y ---\n"), written)  # and back to today
        for odd in ("x", "", "9999-99-99T00:00:00.000Z", "0001-01-01T00:00:00.000Z", "99999-01-01T00:00:00"):
            self.assertIn("ann: odd", self.arrive(f"@time={odd} :ann!a@b PRIVMSG #chat :odd"))

    def test_midnight_is_told_once(self) -> None:
        tomorrow = time.localtime(time.time() + 86400)
        self.screen.written = ""
        with mock.patch.object(chat.time, "localtime", lambda *_: tomorrow):  # type: ignore[attr-defined]
            for _ in range(3):
                self.server.turn()
        self.assertEqual(self.screen.written.count(time.strftime("--- %A, %d %B %Y ---", tomorrow)), 1)

    def test_lines_wait_for_their_echo(self) -> None:
        self.enter("echo-message message-tags")
        self.assertIn("\x1b[2m  ... bob: hello\x1b[0m\n", self.type("hello"))
        (line,) = self.said
        self.assertEqual(line.params, ("#chat", "hello"))
        written = self.arrive(f"@{chat.ID_TAG}={line.tags[chat.ID_TAG]} :bob!b@h PRIVMSG #chat :hello")
        self.assertNotIn("...", written)
        self.assertRegex(written, "m\\d\\d:\\d\\d\x1b\\[0m \x1b\\[1;38;5;\\d+mbob\x1b\\[0m: hello\n")

    def test_a_paste_that_is_too_long_is_refused(self) -> None:
        for _ in range(2):  # reads; it is told once
            self.screen._input.put(("\x1b[200~" + "x" * chat.PASTE_CHARS, 0.0))
        self.screen.written = ""
        self.server.turn()
        told = f"*** Error: a paste of more than {chat.PASTE_CHARS} characters is not taken\n"
        self.assertEqual(self.screen.written.count(told), 1)


class WhatItMeans(PersonCase):
    """What a client makes of messages, and of what is typed."""

    def test_completions(self) -> None:
        self.arrive(":s 353 bob = #chat :Abe amy", ":ann!a@b PRIVMSG #chat :hi", ":bob!b@h JOIN #Tea")
        for head, found in (
            ("a", (0, ["ann: ", "amy: ", "Abe: "])), ("AB", (0, ["Abe: "])), ("bo", (0, [])), ("ask am", (4, ["amy "])),
            ("/he", (0, ["/help "])), ("/w", (0, ["/who ", "/whois "])), ("/msg an", (5, ["ann "])), ("/zzz", (0, [])),
            ("/part #", (6, ["#chat ", "#Tea "])), ("/join #t", (6, ["#Tea "])),
        ):  # fmt: skip
            self.assertEqual(chat.completions(self.client, head), found)

    def test_who_is_here(self) -> None:
        for line, people in (
            (":s 353 bob = #chat :@bob ann +cat", "bob ann cat"), (":s 353 bob = #other :dan", "bob ann cat"),
            (":dan!a@b JOIN #chat", "bob ann cat dan"), (":ann!a@b NICK amy", "bob cat dan amy"),
            (":cat!a@b PART #chat :bye", "bob dan amy"), (":dan!a@b QUIT :bye", "bob amy"),
            (":amy!a@b KICK #chat bob :out", ""),
        ):  # fmt: skip
            self.arrive(line)
            self.assertEqual(self.members, people.split(), line)
            self.assertEqual(self.prompt, f"[#chat {len(people.split())}] bob> ")

    def test_commands_of_the_client_itself(self) -> None:
        self.assertIn("Error: nobody has spoken to you alone yet", self.type("/reply hi"))
        self.play(":ann!a@b PRIVMSG bob :psst", "/reply hi there")
        self.assertEqual(self.said[-1].params, ("ann", "hi there"))
        self.lines.clear()
        for step, shown in (
            ("/ignore", "ignored: nobody"), ("/ignore ANN", "ANN is ignored"), (":ann!a@b PRIVMSG #chat :spam", ""),
            (":ann!a@b NICK amy", ""), (":amy!a@b PRIVMSG bob :spam", ""), ("/ignore", "ignored: amy"),
            ("/ignore amy", "amy is shown again"), (":amy!a@b PRIVMSG #chat :ham", "ham"),
            ("/dance", "/dance is not a command; /help lists them"), ("/clear", "\x1b[H\x1b[2J"),
            *(("/help", f"*** /{name}") for name in chat.SLASH_COMMANDS),
        ):  # fmt: skip
            written = self.play(step)
            self.assertIn(shown, written)
            self.assertNotIn("spam", written)
        self.assertEqual(self.lines, [])
        who = (":s 352 bob #chat a h s ann G@ :0 a", ":s 352 bob #chat b h s bob H :0 b", ":s 315 bob #chat :end")
        self.assertIn("*** In #chat: @ann (away) bob", self.play("/whois ann", "/who", *who))
        self.assertIn("*** In #tea: nobody whom you may see", self.play("/names #tea", ":s 315 bob #tea :end"))
        self.assertEqual(self.lines, ["WHOIS ann", "WHO #chat", "WHO #tea"])
        self.assertEqual(self.play(*who), self.screen.written)  # nobody has asked
        self.lose()
        self.assertIn("Error: not connected", self.type("/nick rob"))

    def test_long_lines_are_sent_as_several(self) -> None:
        self.enter(f"{chat.RESUME_CAP} echo-message")
        self.arrive(":bob JOIN #tea")  # so our host is not known
        words = " ".join(f"wörd{number}" for number in range(200))
        for line, shown in ((words, words), (f"/me {words}", words), ("é" * 700, "é" * 700)):
            self.lines.clear()
            self.type(line)
            self.assertGreater(len(self.said), 2)
            source = f"{'b' * chat.NICK_CHARS}!~{'u' * 10}@{'h' * 64}"
            for message in self.said:
                self.assertLessEqual(len(chat.format_line(message._replace(source=source)).encode()) + 2, 512)
            joint = " " if " " in words and line != "é" * 700 else ""
            self.assertEqual(joint.join(message.action or message.text for message in self.said), shown)

    def test_errors_are_shown_and_settle_what_they_are_about(self) -> None:
        for error, left in (
            (":s 404 bob #chat :no", ["two", "psst"]), (":s 401 bob cat :nobody", ["one", "two"]),
            (":s 401 bob dan :nobody", ["one", "two", "psst"]), (":s 417 bob :too long", ["two", "psst"]),
            ("FAIL PRIVMSG INVALID_UTF8 :no", ["two", "psst"]),
        ):  # fmt: skip
            self.enter("echo-message")
            self.play(">one", ">two", "/msg cat psst", error)
            self.assertEqual([text for _, text in self.queued], left, error)
        self.enter("echo-message")
        self.type("one")
        for line in ("477 bob #other :no", "432 bob x :no", "473 bob #x :no", "FAIL CHATHISTORY MESSAGE_ERROR :no"):
            self.assertIn("Error: no", self.arrive(f":s {line}"))
        self.assertEqual(self.queued, [("#chat", "one")])

    def test_a_name_that_is_taken_later_changes_nothing(self) -> None:
        self.assertIn("*** Error: taken", self.play("/nick ann", ":s 433 bob ann :taken"))
        self.arrive(":s 433 bob bob :taken")  # not even then
        self.check("[#chat 2] bob> ", "NICK :ann")
        self.lose()
        self.server.connect()
        self.assertIn("NICK :bob", self.lines)

    def test_leaving_and_being_kicked(self) -> None:
        written = self.arrive(":bob!b@h QUIT :Quit: bye")
        self.assertIn("*** bob left: bye", written)
        self.assertNotIn("/join", written)
        self.assertEqual(self.members, ["ann"])
        for name in ("BOB", "bob"):
            self.enter()
            written = self.arrive(f":ann!a@b KICK #chat {name} :go away")
            self.assertIn(f"*** {name} was kicked out by ann: go away", written)
            self.assertIn("you are no longer in #chat; /join #chat may bring you back", written)

    def test_modes_of_our_channels_are_shown(self) -> None:
        self.arrive(":bob!b@h JOIN #tea")
        self.assertIn("*** ann set +o bob", self.arrive(":ann!a@b MODE #chat +o bob"))
        self.assertIn("*** [#tea] ann set +m", self.arrive(":ann!a@b MODE #TEA +m").replace("#TEA", "#tea"))
        self.assertNotIn("set", self.arrive(":bob!b@c MODE bob :+i", ":ann!a@b MODE #den +m"))

    def test_who_goes_to_another_channel_speaks_there(self) -> None:
        self.enter("echo-message")
        self.type("/join #b green ", "secret for b")
        self.assertEqual(self.lines, ["JOIN #b :green"])
        self.arrive(":bob!b@h JOIN #b")
        self.assertEqual(self.lines[1:], ["PRIVMSG #b :secret for b"])  # and #chat is not left
        shown = self.play("/join #c", "/topic cakes", ":s 473 bob #c :Invite only", ">still b")
        self.assertIn("Error: Invite only", shown)
        self.assertEqual((self.said[-1].params, self.prompt), (("#b", "still b"), "[#b 0] bob> "))

    def test_names_and_targets_that_do_not_fit(self) -> None:
        self.assertIn("Error: that name is too long", self.type(f"/msg {'a' * 600} hello"))
        self.type("/msg ann,,cat, hi")
        self.assertEqual([message.params for message in self.said], [("ann", "hi"), ("cat", "hi")])
        self.assertEqual(chat.split_text("ééé", 1), ["é", "é", "é"])


class AtOtherServers(PersonCase):
    """What a client makes of a server's own ways."""

    def test_local_channels_are_no_people(self) -> None:
        self.screen.colours = ()
        line = ":ann!a@b PRIVMSG &local :hi"
        self.assertIn("[&local] ann: hi\n", self.arrive(line))
        item = json.loads(chat.JSON.encode(chat.parse(line)))
        self.assertEqual((item["type"], item["channel"]), ("chat", "&local"))

    def test_ctcp_is_not_shown_nor_answered(self) -> None:
        shown = self.play(":ann!a@b PRIVMSG bob :\x01VERSION\x01", ":ann!a@b NOTICE bob :\x01PING 1\x01")
        self.assertNotIn("ann", shown)
        self.assertIn("waves", self.arrive(":ann!a@b PRIVMSG #chat :\x01ACTION waves\x01"))
        self.assertIn("nobody has spoken to you alone yet", self.type("/reply hi"))
        self.assertEqual(self.lines, [])

    def test_what_the_server_says_of_itself(self) -> None:
        self.enter("echo-message", "CASEMAPPING=rfc1459 PREFIX=(xo)*@ NICKLEN=9 LINELEN=1024 FOO=BAR")
        self.assertEqual(sorted(self.client.uplink.isupport), ["CASEMAPPING", "LINELEN", "NICKLEN", "PREFIX"])
        self.arrive(":s 353 bob = #chat :*@dan[ ~tim @bob", ":DAN{!a@b PRIVMSG #chat :x", ":dan{!a@b PART #CHAT")
        self.assertEqual(self.members, ["bob", "ann", "~tim"])
        self.play("/msg Dan[] x", ":s 401 bob dan{} :nobody")
        self.assertEqual(self.queued, [])
        room = 1024 - 2 - len(":123456789!b@h PRIVMSG #chat :")
        self.assertEqual(self.pieces("é" * 1000)[0], room // 2)
        self.arrive(":s 005 bob LINELEN=100 :are supported")  # every server takes 512
        self.assertEqual(self.pieces("é" * 1000)[0], (room - 512) // 2)

    def test_numbers_that_are_none(self) -> None:
        uplink = chat.Uplink("bob")
        for value in ("", "0", "-5", "x", "9" * 50, "\u0663"):
            uplink.isupport["LINELEN"] = value
            self.assertEqual(uplink.limit("LINELEN", 512, 4096), 512, value)
        uplink.isupport["LINELEN"] = "99999"
        self.assertEqual(uplink.limit("LINELEN", 512, 4096), 4096)

    def test_our_host_is_learnt(self) -> None:
        unknown = f"~{'u' * 10}@{'h' * 64}"
        for said, host in (
            (":bob!u@short JOIN #tea", "u@short"), (":ann!a@somewhere.else PRIVMSG #chat :hi", "u@short"),
            ("@batch=1 :bob!u@from.the.past PRIVMSG #chat :hi", "u@short"),
            (":s 396 bob u@cloak :is now your host", unknown), (":ann!b@h CHGHOST u new", unknown),
            (":bob!u@a.longer.host PRIVMSG #tea :an echo", "u@a.longer.host"),
            (":bob!u@a.longer.host CHGHOST u new", unknown),
        ):  # fmt: skip
            with mock.patch.object(self.client.ui, "show") as show:
                self.arrive(said)
            self.assertEqual(show.called, "PRIVMSG" in said or "JOIN" in said)
            self.assertEqual(self.pieces("x" * 1000)[0], 512 - 2 - len(f":{'b' * 24}!{host} PRIVMSG #chat :"), said)

    def test_capabilities_come_and_go(self) -> None:
        self.start()
        self.server.connect()
        self.arrive(":s CAP * LS * :batch sasl=PLAIN", ":s CAP * LS :echo-message message-tags=x")
        self.assertEqual(self.lines[-1], "CAP REQ :batch echo-message message-tags")
        self.arrive(":s CAP bob ACK :batch echo-message message-tags")
        self.assertEqual(self.lines[-1], "CAP END")
        self.arrive(":s 001 bob :Welcome", *self.IN)
        self.lines.clear()
        self.arrive(":s CAP bob NEW :server-time=1 sasl batch", ":s CAP bob NEW :sasl")
        self.assertEqual(self.lines, ["CAP REQ :server-time"])
        self.assertNotIn("server-time", self.client.uplink.caps)
        self.arrive(":s CAP bob NAK :server-time", ":s CAP bob ACK :server-time sasl")
        self.assertEqual(self.lines[1:], [])
        self.assertEqual(self.client.uplink.caps, {"batch", "echo-message", "message-tags", "server-time"})
        self.type("hello")
        line_id = self.said[0].tags[chat.ID_TAG]
        self.assertIn("\x1b[0m: hello\n", self.arrive(":s CAP bob DEL :echo-message message-tags"))
        self.assertEqual(self.client.uplink.caps, {"batch", "server-time"})
        self.assertEqual(self.lines[2:], [f"PING {line_id}"])  # for no echo will come
        self.arrive(f":s PONG s {line_id}")
        self.assertEqual(self.queued, [])

    def test_the_last_lines_are_as_many_as_the_server_gives(self) -> None:
        self.enter("batch draft/chathistory", "CHATHISTORY=5")
        self.client.replay = 20
        self.play("/join #tea", ":bob!b@h JOIN #tea")
        self.assertEqual(self.lines, ["JOIN #tea", "CHATHISTORY LATEST #tea * :5"])

    def test_a_past_of_which_nothing_is_new_is_not_announced(self) -> None:
        for line, again in (
            ("@batch=1;msgid=x :ann!a@b PRIVMSG #tea :old", 0), ("@batch=1;msgid=y :eve!a@b JOIN #tea", 1),
        ):  # fmt: skip
            self.enter("batch draft/chathistory message-tags")
            self.client.replay = 20
            for told in (1, again):  # the second time a message has been shown
                self.play("/join #tea", ":bob!b@h JOIN #tea")
                written = self.play("BATCH +1 chathistory #tea", line, "BATCH -1")
                self.assertEqual(written.count("the last 1 line, said before"), told, line)
                self.play("/part", ":bob!b@h PART #tea")

    def test_a_server_may_look_for_our_host_first(self) -> None:
        for heard, now, text in (
            (0, 11, "is --port right"), (5, 34, ""), (5, 36, "does not let you in"), (100, 119, ""),
            (110, 121, "does not let you in"),  # however often it asks whether we are there
        ):  # fmt: skip
            self.start()
            self.server.connect()
            self.client.uplink.since, self.client.uplink.heard = 1000.0, 1000.0 + heard
            with self.subTest(now), contextlib.ExitStack() as stack:
                if text:
                    stack.enter_context(self.assertRaisesRegex(chat.FatalError, text))
                self.client.turn(1000.0 + now)

    def test_only_the_first_welcome_counts(self) -> None:
        self.type("/join #tea")
        self.assertNotIn("***", self.arrive(":s 001 rob :Welcome"))
        self.check("[#chat 2] bob> ", "JOIN #tea")

    def test_channel_keys(self) -> None:
        self.play("/join #b sesame", ":bob!b@h JOIN #b")
        self.assertEqual(self.lines, ["JOIN #b :sesame"])
        self.reconnect()
        self.assertEqual(self.lines, ["JOIN #chat", "JOIN #b :sesame"])


class Removing(PersonCase):
    """/redact, and messages that others remove."""

    CAPS = "batch draft/chathistory draft/message-redaction echo-message message-tags"

    def test_our_last_line(self) -> None:
        self.arrive("@msgid=1 :bob!b@h PRIVMSG #chat :a slip", "@msgid=2 :ann!a@h PRIVMSG #chat :hi")
        shown = self.play("/redact", "/redact 2 off topic", ":bob!b@h REDACT #chat 1")
        self.assertEqual(self.lines, ["REDACT #chat :1", "REDACT #chat 2 :off topic"])
        self.assertRegex(shown, "bob removed a message\x1b")
        self.assertIn(
            "*** bob removed a message of ann: off topic",
            self.arrive(f"@{chat.AUTHOR_TAG}=ann :bob!b@h REDACT #chat 2 :off topic"),
        )

    def test_there_is_nothing_to_remove(self) -> None:
        self.assertIn("*** Error: you have said nothing here that could be removed", self.play("/redact"))
        self.enter("echo-message")
        self.assertIn("*** Error: this server does not let lines be removed", self.play("/redact 2"))
        self.assertEqual(self.lines, [])

    def test_what_was_removed_while_it_was_held_back_is_not_shown(self) -> None:
        self.arrive("@msgid=1 :ann!a@h PRIVMSG #chat :hi")
        self.reconnect(self.CAPS)
        said = [f"@msgid={number} :ann!a@h PRIVMSG #chat :<{number}>" for number in (2, 3)]
        shown = self.arrive(":bob!b@h JOIN #chat", *said, ":ann!a@h REDACT #chat 2")
        self.assertNotIn("<", shown)
        shown = self.arrive("BATCH +1 chathistory #chat", "BATCH -1")
        self.assertEqual(re.findall("<.>", shown), ["<3>"])


class IsTyping(PersonCase):
    """+typing, IRCv3's client-only tag."""

    CAPS = "message-tags echo-message"

    def keys(self, text: str, later: float = 0.0) -> list[str]:
        """Types keys, so many seconds later than before; returns which states were told."""
        self.now = getattr(self, "now", time.monotonic()) + later
        self.lines.clear()
        if text:
            self.screen._input.put((text, 1.0))
        with mock.patch.object(time, "monotonic", lambda: self.now):
            self.server.turn()
        told = [chat.parse(line) for line in self.lines if "TAGMSG" in line]
        self.assertEqual({message.params for message in told}, {("#chat",)} if told else set())
        return [message.tags["+typing"] for message in told]

    def test_we_tell_that_we_type_at_the_pace_of_the_specification(self) -> None:
        steps = [
            ("h", 0.0, ["active"]), ("e", 1.0, []), ("y", 1.9, []), ("", 0.2, ["active"]), ("", 3.0, ["active"]),
            ("", 2.0, ["paused"]), ("", 20.0, []), ("!", 1.0, ["active"]), ("\x15", 0.5, ["done"]), ("x", 1.0, []),
            ("y", 1.6, ["active"]), ("\r", 1.0, []), ("", 9.0, []), ("/me waves", 3.0, []), ("\x15", 1.0, []),
        ]  # fmt: skip
        for number, (text, later, told) in enumerate(steps):
            with self.subTest(number=number, text=text):
                self.assertEqual(self.keys(text, later), told)

    def test_where_it_is_not_told(self) -> None:
        self.client.typing.wanted = False  # --no-typing
        self.assertEqual(self.keys("hi", 9.0), [])
        for caps, isupport in (("", ""), (self.CAPS, "CLIENTTAGDENY=*"), (self.CAPS, "CLIENTTAGDENY=x,typing")):
            self.enter(caps, isupport)
            self.assertEqual(self.keys("hi", 9.0), [])
        self.enter(self.CAPS, "CLIENTTAGDENY=*,-typing")
        self.assertEqual(self.keys("hi", 9.0), ["active"])
        self.assertEqual(self.arrive(":s 404 bob #chat :You are muted"), "")
        self.assertEqual((self.keys("x", 9.0), self.keys("y", 9.0)), ([], []))
        self.arrive("@msgid=1 :bob!b@h PRIVMSG #chat :it works again")
        self.assertEqual(self.keys("z", 9.0), ["active"])
        self.lose()
        self.assertEqual(self.keys("z", 9.0), [])
        self.reconnect(self.CAPS)
        self.arrive(*self.IN)
        self.assertEqual(self.keys("z", 9.0), ["active"])

    def test_a_refusal_of_something_else_is_shown(self) -> None:
        self.assertIn("Error: no", self.arrive(":s 404 bob #chat :no"))
        self.keys("hi", 9.0)
        self.assertIn("Error: no", self.arrive(":s 404 bob #tea :no"))

    def test_others_type(self) -> None:
        typing = "@+typing={} :{}!a@h TAGMSG {}".format
        self.assertIn("  ... ann is typing\x1b", self.arrive(typing("active", "ann", "#chat")))
        shown = self.arrive(typing("active", "eve", "bob"), typing("active", "tom", "#tea"))
        self.assertIn("  ... ann, eve (private) are typing\x1b", shown)
        self.assertIn("  ... eve (private) is typing", self.arrive(":ann!a@h PRIVMSG #chat :hello"))
        quiet = self.arrive(typing("done", "eve", "bob"), typing("active", "bob", "#chat"))
        self.assertNotIn("typing", quiet)
        self.assertIn(r"e\x1b[2J is typing", self.arrive(typing("active", "e\x1b[2J", "#chat")))
        self.keys("", 6.1)
        self.assertNotIn("typing", self.arrive(":ann!a@h PRIVMSG #chat :hello"))
        self.assertEqual(self.client.typing.others, {})
        self.play("/ignore ann")
        self.assertNotIn("typing", self.arrive(typing("active", "ann", "#chat")))
        self.arrive(*[typing("active", f"n{number}", "#chat") for number in range(200)])
        self.assertEqual(len(self.client.typing.others), chat.NAMES_SHOWN)
        self.assertEqual(self.client.pause(self.now), chat.CLIENT_TICK_S)


class Snippets(PersonCase):
    """Messages of several lines (draft/multiline): pasted, and shown."""

    CAPS = "batch echo-message message-tags draft/multiline=max-bytes=90,max-lines=4 draft/chathistory"

    def paste(self, text: str) -> str:
        """Pastes and says yes; returns what is shown."""
        self.screen.written = ""
        self.screen._input.put((f"\x1b[200~{text}\x1b[201~y", 0.0))
        self.server.turn()
        return self.screen.written

    def arrive(self, *lines: str) -> str:
        return re.sub(r"\x1b\[[\d;]*m", "", super().arrive(*lines))

    def batches(self) -> list[list[tuple[str, bool]]]:
        """The lines of each message that was sent, and which of them go on in the one before."""
        found: dict[str, list[tuple[str, bool]]] = {}
        for message in map(chat.parse, self.lines):
            reference = message.tags.get("batch", "")
            if message.command == "PRIVMSG":
                found.setdefault(reference, []).append((message.text, chat.CONCAT_TAG in message.tags))
                self.assertEqual(message.param(0), "#chat")
            elif message.param(0)[:1] == "+":
                self.assertEqual(message.params[1:], (chat.MULTILINE_CAP, "#chat"))
                self.assertEqual(message.tags, {chat.ID_TAG: message.param(0)[1:]})
        return list(found.values())

    @staticmethod
    def batch(*texts: str, tags: str = "", source: str = "ann!a@h") -> list[str]:
        lines = [f"@batch=9 :{source} PRIVMSG #chat :{text}" for text in texts]
        return [f"{tags} :{source} BATCH +9 draft/multiline #chat".strip(), *lines, "BATCH -9"]

    def test_a_paste_is_one_message(self) -> None:
        self.paste("def f():\n\n    return 1\r\n")
        self.assertEqual(self.batches(), [[("def f():", False), ("", False), ("    return 1", False)]])
        self.assertEqual(self.lines[0].split(" ", 1)[1][:7], "BATCH +")
        self.assertEqual(len(self.client.queue), 1)
        echo = [line.replace(" BATCH", " :bob!b@h BATCH", 1) for line in self.lines]
        shown = self.arrive(*(line.replace(" PRIVMSG", " :bob!b@h PRIVMSG", 1) for line in echo))
        self.assertEqual(len(self.client.queue), 0)
        self.assertRegex(shown, r"\d bob: def f\(\):\n *\n          return 1\n")

    def test_what_is_too_much_is_several_messages(self) -> None:
        """Neither begins nor ends with a blank line; a long line is one in the end, with all its blanks."""
        self.paste("\n".join("abcd") + "\n\n\n" + "\n".join("efg"))
        self.assertEqual([[text for text, _ in batch] for batch in self.batches()], [list("abcd"), list("efg")])
        self.enter(self.CAPS)
        self.paste("a\nb\n\n \nc\nd")
        self.assertEqual([[text for text, _ in batch] for batch in self.batches()], [["a", "b"], ["c", "d"]])
        self.enter(self.CAPS.replace("=90", "=9000"))
        long = "word  " + " ".join(["words"] * 200)
        self.paste(f"{long}\nend")
        ((*pieces, end),) = self.batches()
        self.assertEqual("".join(text for text, _ in pieces), long)
        self.assertEqual([text[0] + text[-1] for text, _ in pieces], ["w ", "w ", "ws"])  # not to begin with a blank
        self.assertEqual(([goes_on for _, goes_on in pieces], end), ([False, True, True], ("end", False)))
        self.enter(self.CAPS)
        self.paste("x" * 80 + "\ny\n" + "z" * 80)
        self.assertEqual([len(batch) for batch in self.batches()], [2, 1])

    def test_servers_without_it_get_lines(self) -> None:
        caps = "batch message-tags echo-message"
        self.enter(caps)
        self.paste("a\n\n/b\nc")
        self.assertEqual([message.text for message in self.said], ["a", "/b", "c"])
        self.assertNotIn("BATCH", "".join(self.lines))
        for limits in ("", "=max-lines=9", "=max-bytes=0", "=max-bytes=x,max-lines=3"):
            self.enter(f"{caps} draft/multiline{limits}")
            self.paste("a\nb")
            self.assertNotIn("BATCH", "".join(self.lines), limits)

    def test_it_waits_until_there_is_a_connection(self) -> None:
        """Which may be one to a server that does not know it; a shown part is never sent twice."""
        self.lose()
        self.assertIn("  ... bob: a b", self.paste("a\nb"))
        self.connect(self.CAPS)
        self.arrive(*self.IN)
        self.arrive("BATCH +1 chathistory #chat", "BATCH -1")
        self.assertEqual(self.batches(), [[("a", False), ("b", False)]])
        self.reconnect("echo-message batch message-tags")
        self.arrive(*self.IN)
        self.assertEqual([message.text for message in self.said], ["a", "b"])
        self.assertEqual(self.queued, [("#chat", "a"), ("#chat", "b")])

    def test_not_all_of_a_large_paste_is_sent_at_once(self) -> None:
        """A server of ours drops whoever leaves much unread for long, and a part of a message would be lost by that."""
        self.enter(f"{self.CAPS} {chat.RESUME_CAP}".replace("=90,max-lines=4", "=900,max-lines=30"))
        self.paste("\n".join(["x" * 20] * 600))
        sent = 0
        while self.client.queue:
            batches = self.batches()
            self.assertLess(sum(map(len, self.lines)), chat.FLOOD_BYTES)
            sent += sum(map(len, batches))
            self.lines.clear()
            waiting = self.client.queue.messages[: self.client.queue.sent]
            self.arrive(*[f"@{chat.ID_TAG}={pending.id} :bob!b@h PRIVMSG #chat :x" for pending in waiting])
        self.assertEqual(sent, 600)

    def test_a_refused_one_is_not_waited_for(self) -> None:
        self.paste("a\nb")
        self.assertIn("*** Error: too many", self.arrive(":s FAIL BATCH MULTILINE_MAX_LINES 1 :too many"))
        self.assertEqual(self.queued, [])

    def test_it_is_shown_as_a_block(self) -> None:
        shown = self.arrive(*self.batch("one", "", "  two bob", "12:00 eve: three", tags="@msgid=1"))
        self.assertRegex(shown, r"\d\d:\d\d ann: one\n *\n        two bob\n      12:00 eve: three\n")
        self.assertEqual(self.arrive(*self.batch("again", tags="@msgid=1")).count("again"), 0)
        self.assertIn("\a", shown)
        lines = self.batch("how is ", "everyone?")
        lines[2] = lines[2].replace("=9", f"=9;{chat.CONCAT_TAG}")
        self.assertIn("ann: how is everyone?\n", self.arrive(*lines))
        self.assertEqual(self.arrive(*self.batch()), "")
        self.assertIn("ann: hi", self.arrive("BATCH + draft/multiline #chat", ":ann!a@h PRIVMSG #chat hi"))

    def test_no_row_is_forged(self) -> None:
        """Nothing but what the program writes is at the left."""
        texts = ["\x1b[2J\x1b[H", "12:00 *** eve left", "\r\x85\u2028\u202ex", "word " * 40, "x" * 200, " " * 90 + "y"]
        shown = self.arrive(*self.batch("first", *texts))
        rows = shown[shown.index("first") : shown.rindex("[#chat")].split("\n")[1:-1]
        self.assertGreater(len(rows), len(texts))
        for row in rows:
            self.assertTrue(row.startswith(" " * chat.INDENT), repr(row))
            self.assertTrue(row.replace("\x1b[K", "").isprintable(), repr(row))

    def test_the_past_has_blocks(self) -> None:
        self.arrive("@msgid=1 :ann!a@h PRIVMSG #chat :hi")
        self.reconnect(self.CAPS)
        self.arrive(":bob!b@h JOIN #chat")
        shown = self.arrive(
            "BATCH +1 chathistory #chat", *self.batch("one", "two", tags="@batch=1;msgid=2"), "BATCH -1"
        )
        self.assertRegex(shown, r"ann: one\n      two\n")

    def test_whoever_is_ignored_shows_no_block(self) -> None:
        self.assertNotIn("one", self.play("/ignore ann") + self.arrive(*self.batch("one", "two")))

    def test_batches_of_a_server_fill_no_memory(self) -> None:
        """What is too much is shown as lines."""
        with mock.patch.multiple(chat, OPEN_BATCHES=2, BATCH_LINES=3):
            shown = self.arrive(*self.batch("1", "2", "3", "<4>")[:-1])
            self.assertIn("ann: <4>\n", shown)
            for number in range(5):
                self.arrive(f":ann!a@h BATCH +{number} draft/multiline #chat")
            self.assertIn("ann: <5>\n", self.arrive("@batch=4 :ann!a@h PRIVMSG #chat :<5>"))
            self.assertRegex(self.arrive("BATCH -9", "BATCH -9", "BATCH -"), r"ann: 1\n      2\n      3\n")
        with mock.patch.object(chat, "BATCH_CHARS", len("#chat") + 9):
            shown = self.arrive(*self.batch("a" * 4, "b" * 5, "c"))
            self.assertRegex(shown, r"(?s)ann: c\n.*ann: aaaa\n      bbbbb\n")
        self.lose()
        self.assertNotIn("two", self.play("/clear"))

    def test_a_pipe_gets_lines_with_the_name(self) -> None:
        message = chat.join_lines(
            Message("PRIVMSG", ("#chat",), "ann!a@h"), [chat.Line("a"), chat.Line(""), chat.Line("b")]
        )
        for as_json, wanted in ((False, "ann: a\nann: b\n"), (True, '"text": "a\\n\\nb"')):
            out = io.TextIOWrapper(io.BytesIO(), newline="\n", write_through=True)
            with mock.patch.object(sys, "stdout", out):
                ui = chat.PipeUI(self.client, None, as_json=as_json)
                ui.show(message, False)
            self.assertIn(wanted, out.buffer.getvalue().decode())


class WhichChannelIsOurs(PersonCase):
    """Where a client takes itself to be, whatever a server does with it."""

    def test_channels_that_a_server_puts_us_in_are_not_ours(self) -> None:
        self.screen.colours = ()
        for line, shown in (
            (":bob!b@h JOIN #lobby", "*** [#lobby] bob joined\n"), (":s 353 bob = #lobby :bob dan eve", ""),
            (":s 366 bob #lobby :End", ""), (":dan!d@h JOIN #lobby", "*** [#lobby] dan joined\n"),
            (":dan!d@h PRIVMSG #lobby :hi bob", "[#lobby] dan: hi bob\n"),
            (":dan!d@h PRIVMSG #lobby :\x01ACTION waves\x01", "[#lobby] * dan waves\n"),
            (":bob!b@h PRIVMSG #lobby :an echo", "[#lobby] bob: an echo\n"),
            (":dan!d@h TOPIC #lobby :cakes", "*** [#lobby] dan set the topic: cakes\n"),
            (":s NOTICE #lobby :be nice", "*** [#lobby] be nice\n"),
            (":dan!d@h KICK #lobby eve :shoo", "*** [#lobby] eve was kicked out by dan: shoo\n"),
            (":dan!d@h PART #lobby", "*** [#lobby] dan left\n"), (":eve!e@h QUIT :#lobby", "*** eve left (#lobby)\n"),
            (":ann!a@h PRIVMSG @#CHAT :for operators", "[@#CHAT] ann: for operators\n"),
            (":ann!a@h PRIVMSG #CHAT :ours", "ann: ours\n"), (":ann!a@h PRIVMSG bob :alone", "[private] ann: alone\n"),
        ):  # fmt: skip
            with self.subTest(line):
                prompt = r"\[#chat 2( \| #lobby \+[12])?\] bob> $"
                self.assertEqual(re.sub(rf"\r\x1b\[K|\a|\d\d:\d\d |{prompt}", "", self.arrive(line)), shown)
        self.assertIn(" [#lobby] bob: not echoed\n", self.type("/msg #lobby not echoed"))
        self.arrive(":s CAP bob NEW :echo-message", ":s CAP bob ACK :echo-message")
        self.lines.clear()
        self.assertIn("  ... [#lobby] bob: hi all\n", self.type("/msg #lobby hi all"))
        self.assertIn("  ... bob: hello\n", self.type("hello"))
        self.assertEqual(self.lines, ["PRIVMSG #lobby :hi all", "PRIVMSG #chat :hello"])
        self.assertIn(" [#lobby] bob: hi all\n", self.arrive(":s CAP bob DEL :echo-message"))

    def test_a_bouncer_brings_channels_of_its_own(self) -> None:
        self.start()
        self.connect()
        self.type("secret")
        for channel in ("#a", "#chat", "#zebra"):
            self.assertEqual(bool(self.said), channel == "#zebra")
            self.arrive(f":bob!b@h JOIN {channel}", f":s 353 bob = {channel} :bob ann {channel[1:]}")
        self.assertEqual([message.params for message in self.said], [("#chat", "secret")])
        self.assertEqual(self.members, ["bob", "ann", "chat"])
        self.assertEqual([line for line in self.lines if "JOIN" in line], ["JOIN #chat"])

    def test_going_to_a_channel_that_we_are_in(self) -> None:
        self.play(":bob!b@h JOIN #Lobby", ":s 353 bob = #Lobby :dan bob", ":bob!b@h JOIN #tea", ":bob!b@h PART #tea")
        self.assertIn("here: dan", self.type("/join #lobby"))
        self.check("[#Lobby 2] bob> ")  # no answer would come
        self.type("/join #tea")  # no longer
        self.check("[#Lobby 2] bob> ", "JOIN #tea")

    def test_a_channel_that_we_were_in_is_joined_anew(self) -> None:
        self.play(":bob!b@h JOIN #lobby", "/join #lobby", ":ann!a@b KICK #lobby bob :out", "/join #lobby")
        self.assertEqual(self.lines, ["JOIN #lobby"])
        self.play(AGAIN, ":bob!b@h JOIN #lobby", "/join #chat")  # of which we do not know yet whether it takes us back
        self.check("[#lobby 0] bob> ", "JOIN #chat", "JOIN #lobby", "JOIN #chat")

    def test_a_room_that_is_lost_does_not_end_the_way_to_another(self) -> None:
        shown = self.play("/join #lobby", AGAIN, ":s 403 bob #chat :gone", ":bob!b@h JOIN #lobby")
        self.assertIn("Error: gone", shown)
        self.check("[#lobby 0] bob> ", "JOIN #chat", "JOIN #lobby")

    def test_a_server_may_send_us_on(self) -> None:
        for asked in ("#full", "#chat"):  # once we are in, or at the start
            with self.subTest(asked):
                self.enter("echo-message")
                if asked == "#full":
                    self.type("/join #full", "hello, full")
                else:
                    self.start()
                    self.connect()
                    self.lines.clear()
                self.arrive(":s 470 bob #else #wrong :no", ":bob!b@h JOIN #wrong")
                self.assertIn("Error: on", self.arrive(f":s 470 bob {asked} ##over :on", ":s 470 bob #full :odd"))
                self.arrive(":bob!b@h JOIN ##over")
                sent = ["JOIN #full", "PRIVMSG ##over :hello, full"] if asked == "#full" else []
                self.check("[##over 0] bob> ", *sent)
        self.play("/join #full", ":s 470 bob #full ##over :Forwarding", "/join #full")  # to where we are
        self.check("[##over 0] bob> ", *["JOIN #full"] * 2)
        self.start()
        self.connect()
        self.arrive(":bob!b@h JOIN ##over", ":s 470 bob #chat ##over :to where it has put us")
        self.assertEqual(self.prompt, "[##over 0] bob> ")

    def test_whatever_is_said_of_the_channel_is_a_refusal(self) -> None:
        for code in ("405", "407", "437", "439", "448", "471", "477", "479", "480", "489", "495", "500", "520", "599"):
            with self.subTest(code):
                self.enter()
                self.type("/join #Tea")
                for other in (f"{code} bob #else :no", "404 bob #tea :no", "482 bob #tea :no", "332 bob #tea :cakes"):
                    self.arrive(f":s {other}")
                    self.assertEqual(self.client.rooms.pending, "#Tea", other)
                self.assertIn("Error: not you", self.arrive(f":s {code} bob #tea :not you"))
                self.assertEqual(self.client.rooms.pending, "")
                self.start()
                self.connect()
                self.arrive(":s 470 bob #chat :on")
                told = "^cannot join #chat: not you; choose another with --channel$"
                self.assertRaisesRegex(chat.FatalError, told, self.arrive, f":s {code} bob #CHAT :not you")

    def test_who_was_kicked_comes_back_only_by_join(self) -> None:
        self.arrive(":ann!a@b KICK #chat bob :out")
        told = "*** connected again, not in #chat; /join #chat may bring you back"
        for name in ("bob", "bob2"):
            self.assertIn(told, self.reconnect(nick=name))
            self.check(f"[#chat 0] {name}> ")
        self.type("/join #chat")
        self.assertEqual(self.lines, ["JOIN #chat"])
        self.arrive(":s 474 bob2 #chat :banned")
        self.assertIn(told, self.reconnect(nick="bob2"))
        self.assertNotIn("connected again", self.play("/join #chat", ":bob2!b@h JOIN #chat"))
        self.reconnect(nick="bob2")
        self.assertEqual(self.lines, ["JOIN #chat"])

    def test_who_was_kicked_and_goes_elsewhere_does_so_after_a_loss(self) -> None:
        self.play(":ann!a@b KICK #chat bob :out", "/join #tea", AGAIN, ":bob!b@h JOIN #tea")
        self.check("[#tea 0] bob> ", "JOIN #tea")

    def test_a_join_that_is_never_answered_ends(self) -> None:
        self.enter("echo-message")
        self.type("/join #tea", "/msg #chat hello")
        deadline = self.client.uplink.heard = self.client.uplink.deadline
        for late, sent in ((-1, []), (1, ["PRIVMSG #chat :hello"])):
            self.client.turn(deadline + late)
            self.assertEqual(self.lines, ["JOIN #tea", *sent])
        self.type("/join #tea")
        self.check("[#chat 2] bob> ", "JOIN #tea", "PRIVMSG #chat :hello", "JOIN #tea")

    def test_one_channel_at_a_time(self) -> None:
        self.assertIn("Error: one channel at a time", self.type("/join #a,#b"))
        self.assertNotIn("Error", self.type("/join #a"))
        self.assertIn("Error: one channel at a time", self.type("/join #b"))
        self.assertEqual(self.lines, ["JOIN #a"])


class SeveralRooms(PersonCase):
    """A client that is in two channels."""

    TEA = (":bob!b@h JOIN #tea", ":s 353 bob = #tea :bob cat dan", ":s 366 bob #tea :End")

    def setUp(self) -> None:
        super().setUp()
        self.screen.colours = ()
        self.arrive(*self.TEA)

    def test_what_is_said_elsewhere_is_counted_until_we_speak_there(self) -> None:
        self.type("/ignore dan")
        self.arrive(*(f":{nick}!c@h PRIVMSG #tea :hi" for nick in ("cat", "cat", "dan", "bob")), ":cat!c@h PART #tea")
        self.assertEqual(self.prompt, "[#chat 2 | #tea +2] bob> ")
        self.assertIn("*** here: dan\n", self.type("/join #tea"))
        self.check("[#tea 2] bob> ")
        self.assertIn(" [#chat] ann: hey\n", self.arrive(":ann!a@b PRIVMSG #chat :hey"))
        self.assertEqual(self.prompt, "[#tea 2 | #chat +1] bob> ")
        self.play(":cat!c@h PRIVMSG #tea :here", ">tea", "/msg #chat later", "/join #chat")
        self.assertEqual(self.prompt, "[#chat 2] bob> ")
        self.assertEqual([message.params for message in self.said], [("#tea", "tea"), ("#chat", "later")])

    def test_leaving_another_room(self) -> None:
        written = self.play("/part #tea", ":bob!b@h PART #tea")
        self.assertIn("*** [#tea] bob left\n", written)
        self.assertNotIn("no longer", written)
        self.type("/join #tea")
        self.check("[#chat 2] bob> ", "PART #tea", "JOIN #tea")

    def test_leaving_the_active_room_goes_to_another(self) -> None:
        self.assertNotIn("no longer", self.play("/part", ":bob!b@h PART #chat"))
        self.assertEqual(self.prompt, "[#tea 3] bob> ")
        told = "you are no longer in #tea; /join #tea may bring you back"
        self.assertIn(told, self.play("/part", ":bob!b@h PART #tea"))
        self.assertEqual(self.lines, ["PART #chat", "PART #tea"])

    def test_who_is_where(self) -> None:
        self.arrive(":ann!a@b JOIN #tea", ":cat!c@h NICK kit", ":ann!a@b QUIT :bye", ":dan!d@h JOIN #chat")
        self.assertEqual(self.members, ["bob", "dan"])
        self.type("/join #tea")
        self.assertEqual(self.members, ["bob", "dan", "kit"])
        self.assertNotIn("no longer", self.arrive(":ann!a@b KICK #chat bob :out"))
        self.assertEqual(chat.completions(self.client, "/join #"), (6, ["#tea "]))

    def test_all_rooms_are_joined_again(self) -> None:
        self.type("/join #tea")
        self.arrive(":ann!a@b PRIVMSG #chat :hey")
        self.lose()
        self.type("hi")
        self.connect()
        self.assertEqual(self.lines, ["JOIN #chat", "JOIN #tea"])
        self.assertNotIn("***", self.arrive(*self.IN))
        self.assertEqual((self.prompt, self.said), ("[connecting] bob> ", []))
        self.assertIn("*** connected again", self.arrive(*self.TEA))
        self.assertEqual((self.prompt, self.said[0].params), ("[#tea 3 | #chat +1] bob> ", ("#tea", "hi")))
        self.reconnect()
        self.assertEqual(self.lines, ["JOIN #chat", "JOIN #tea"])

    def test_a_room_that_does_not_take_us_back(self) -> None:
        self.assertIn("*** Error: banned", self.play(AGAIN, ":s 474 bob #tea :banned"))
        self.assertIn("*** connected again", self.arrive(*self.IN))
        self.reconnect()
        self.assertEqual(self.lines, ["JOIN #chat"])

    def test_what_is_sent_again_is_told_wherever_we_are_then(self) -> None:
        self.enter("echo-message")
        self.arrive(*self.TEA)
        self.type("/msg dan psst")
        self.reconnect("echo-message")
        again = "sent again, so perhaps twice"
        self.assertIn(again, self.arrive(":s 474 bob #chat :banned"))
        self.assertIn(again, self.reconnect("echo-message"))
        self.assertEqual(self.prompt, "[#chat 0] bob> ")

    def test_a_join_that_is_not_answered_after_a_reconnect_ends(self) -> None:
        self.type("/join #full")
        self.reconnect()
        self.arrive(*self.IN)
        self.assertEqual(self.prompt, "[connecting] bob> ")
        self.client.turn(self.client.uplink.deadline + 1)
        self.assertEqual(self.prompt, "[#chat 2] bob> ")

    def test_the_active_room_does_not_take_us_back(self) -> None:
        banned = (":s 474 bob #chat :banned",)
        for answers in ((self.TEA, banned), (banned, self.TEA)):
            self.enter()
            self.arrive(*self.TEA)
            self.reconnect()
            written = "".join(self.arrive(*answer) for answer in answers)
            self.assertIn("connected again, not in #chat; /join #chat may bring you back", written)
            self.assertEqual(self.prompt, "[#chat 0] bob> ")
            self.type("/join #tea")
            self.check("[#tea 3] bob> ", "JOIN #chat", "JOIN #tea")
        self.reconnect()
        self.assertRaisesRegex(chat.FatalError, "cannot join #tea: banned", self.arrive, ":s 474 bob #tea :banned")

    def test_kicked_from_the_active_room_before_the_connection_is_lost(self) -> None:
        self.assertIn("connected again, not in #chat", self.play(":ann!a@b KICK #chat bob :out", AGAIN, *self.TEA))
        self.check("[#chat 0] bob> ", "JOIN #tea")


class Reconnected(PersonCase):
    """What stays of a connection when it is lost, and what does not."""

    CAPS = f"batch {chat.RESUME_CAP} draft/chathistory echo-message message-tags server-time"

    def test_a_server_that_does_not_know_us_any_more(self) -> None:
        self.lose()
        self.server.connect()
        self.arrive(f":s CAP * NAK :{self.CAPS}")
        self.assertIsNone(self.client.uplink.sock)
        self.lines.clear()
        self.server.connect()
        self.assertEqual(self.lines, ["CAP LS :302", "NICK :bob", "USER bob 0 * :bob"])
        self.arrive(":s CAP * LS :echo-message", ":s CAP * ACK :echo-message", ":s 001 bob :Welcome")
        self.assertIn("*** connected again; what was said meanwhile is not known here", self.arrive(*self.IN))
        self.assertEqual(self.lines[3:], ["CAP REQ :echo-message", "CAP END", "JOIN #chat"])
        self.enter(self.CAPS)
        self.lose()
        self.server.connect()
        with mock.patch.object(chat, "FRAME_S", -1):
            self.assertIn("has become another server", self.arrive(f":s CAP * NAK :{self.CAPS}"))

    def test_nothing_is_done_until_the_next_try(self) -> None:
        self.server.sock.sendall(b"ERROR :bye\r\n")
        self.lose()
        self.server.turn()
        self.assertIsNone(self.client.uplink.sock)
        self.assertGreater(self.client.pause(time.monotonic()), 0)

    def test_nothing_of_the_last_connection_stays(self) -> None:
        self.enter("", "CASEMAPPING=ascii LINELEN=1024 NICKLEN=9 PREFIX=(x)*")
        self.assertEqual(len(self.pieces("x" * 1000)), 2)
        self.assertTrue(self.client.uplink.is_me("BOB"))
        self.type(*"12345")
        self.arrive("ERROR :the last words")
        self.reconnect()
        self.arrive(":bob!b@h JOIN #CHAT", ":s 353 bob = #chat :bob x[ X{ *eve", ":s PONG s :read")
        self.assertEqual(self.members, ["bob", "x[", "*eve"])
        self.assertEqual(len(self.pieces("x" * 1000)), 3)
        self.type(*"67890")
        self.assertEqual([message.text for message in self.said], [*"67890"])
        self.assertNotIn("the last words", self.lose())


class Missed(PersonCase):
    """What was said while a client was away, at a server that keeps it (draft/chathistory)."""

    CAPS = "batch draft/chathistory"

    def setUp(self) -> None:
        super().setUp()
        self.come_back()

    def come_back(self, isupport: str = "") -> None:
        """Connects again, and asks for what was said after message 1."""
        self.enter(self.CAPS, isupport)
        self.arrive(self.message(1))
        self.reconnect(self.CAPS, isupport)
        self.arrive(":bob!b@h JOIN #chat")

    def message(self, number: int, channel: str = "#chat") -> str:
        tags = f"msgid=m{number};time=2026-01-01T00:00:00.{number:03d}Z"
        return f"@{tags} :ann!a@b PRIVMSG {channel} :<{number}>"

    def page(self, *numbers: int, channel: str = "#chat") -> str:
        """Returns the messages that are shown when a page has arrived."""
        page = [f"@batch=1;{self.message(number, channel)[1:]}" for number in numbers]
        return self.shown(f"BATCH +1 chathistory {channel}", *page, "BATCH -1")

    @contextlib.contextmanager
    def limits(self, **limits: Any) -> Iterator[None]:
        """Comes back with other limits."""
        with mock.patch.multiple(chat, **limits):
            self.come_back()
            yield

    def shown(self, *lines: str) -> str:
        return " ".join(re.findall(r"<(\w+)>", self.arrive(*lines)))

    def said_live(self) -> str:
        """Returns what is shown when somebody says "live"."""
        return self.shown(":cat!c@h PRIVMSG #chat :<live>")

    def asked(self) -> list[str]:
        """What was asked for: references and numbers."""
        return [line.split(" ", 3)[3] for line in self.lines if line.startswith("CHATHISTORY")]

    def test_it_is_asked_for_page_by_page(self) -> None:
        ids, times = ["msgid=m1 :3", "msgid=m4 :3"], [f"timestamp=2026-01-01T00:00:00.00{n}Z :3" for n in (1, 4)]
        for tokens, ours, asked in (
            ("", 3, ids), ("CHATHISTORY=0 MSGREFTYPES=timestamp,msgid", 3, ids),
            ("CHATHISTORY=500 MSGREFTYPES=msgid", 3, ids), ("CHATHISTORY=3 MSGREFTYPES=other,msgid", 100, ids),
            ("CHATHISTORY=3 MSGREFTYPES=timestamp", 100, times),
        ):  # fmt: skip
            with self.subTest(tokens), mock.patch.object(chat, "PAGE_LINES", ours):
                self.come_back(tokens)
                self.assertEqual((self.page(2, 3, 4), self.said_live()), ("2 3 4", ""))
                self.assertEqual(self.page(5), "5 live")
                self.assertEqual(self.asked(), asked)

    def test_the_past_of_another_channel_is_not_ours(self) -> None:
        self.assertEqual((self.page(7, channel="#b"), self.said_live()), ("7", ""))
        self.assertEqual(self.page(2), "2 live")
        self.play("@msgid=m8 :ann!a@b PRIVMSG bob :psst", AGAIN, ":bob!b@h JOIN #chat")
        self.assertEqual(self.asked(), ["msgid=m2 :100"])

    def test_a_page_that_never_ends(self) -> None:
        self.assertEqual(self.shown("BATCH +1 chathistory #chat", f"@batch=1;{self.message(2)[1:]}"), "")
        self.assertEqual(self.said_live(), "")
        self.screen.written = ""
        self.client.turn(time.monotonic() + chat.HISTORY_S + 1)
        self.assertEqual(re.findall(r"<(\w+)>", self.screen.written), ["2", "live"])

    def test_a_page_that_does_not_come_before_the_connection_is_lost(self) -> None:
        self.assertEqual(self.said_live(), "")
        self.reconnect()
        self.arrive(":bob!b@h JOIN #chat")
        self.assertEqual(self.said_live(), "live")

    def test_pages_that_were_not_asked_for(self) -> None:
        with self.limits(PAGE_LINES=2):
            self.assertEqual(self.page(2, 3, 4, 5), "2 3")
            self.assertEqual(self.asked(), ["msgid=m1 :2", "msgid=m3 :2"])
        with self.limits(PAGE_LINES=2):
            self.assertEqual([self.page(2, 3), self.page(2, 3)], ["2 3", ""])
            self.assertEqual((len(self.asked()), self.said_live()), (2, "live"))

    def test_pages_without_end(self) -> None:
        with self.limits(PAGE_LINES=1, HISTORY_PAGES=4):
            for number in range(2, 6):
                self.assertEqual((len(self.asked()), self.said_live()), (number - 1, ""))
                self.page(number)
            self.assertEqual((len(self.asked()), self.said_live()), (4, "live"))

    def test_what_is_held_back_is_bounded(self) -> None:
        self.type("hi")
        with mock.patch.object(chat, "HELD_MESSAGES", 2):
            self.assertEqual([self.said_live() for _ in range(3)], ["", "", ""])
            self.assertEqual((self.page(2), len(self.said)), ("2 live live", 0))
        self.assertEqual(self.asked(), ["msgid=m1 :100", "msgid=m2 :100"])  # for the rest
        self.assertEqual((self.page(3), len(self.said)), ("3", 1))

    def test_who_is_kicked_meanwhile_sees_what_has_come(self) -> None:
        self.arrive("BATCH +1 chathistory #chat", f"@batch=1;{self.message(2)[1:]}")
        self.assertEqual(self.said_live(), "")
        self.assertEqual(self.shown(":ann!a@b KICK #chat bob :out"), "2 live")

    def test_a_past_that_cannot_be_read(self) -> None:
        tea = ":bob!b@h JOIN #tea"
        for answer, about, held in (
            (tea, "AFTER #tea", True), (tea, "AFTER #CHAT", False), (tea, "", False),
            (":s 474 bob #tea :banned", "AFTER #tea", True),
        ):  # fmt: skip
            with self.subTest(answer, about=about):
                self.enter(self.CAPS)
                self.play(tea, AGAIN, ":bob!b@h JOIN #chat", answer)
                self.assertIn("*** Error: no", self.arrive(f":s FAIL CHATHISTORY INVALID_TARGET {about} :no"))
                self.assertEqual([self.said_live(), self.page(2)], ["", "2 live"] if held else ["live", "2"])


class Loop(PersonCase):
    """When the client does something, and what it sends at once."""

    CAPS = f"batch {chat.RESUME_CAP} draft/chathistory echo-message message-tags server-time"

    def test_nothing_is_done_while_nothing_happens(self) -> None:
        self.assertGreater(self.client.pause(time.monotonic()), chat.ASK_S - 1)

    def test_a_server_of_ours_is_sent_no_more_than_it_may_leave_unread(self) -> None:
        self.server.close()
        lines = [f"{number:4} {'x' * 300}" for number in range(500)]
        for line in lines:
            self.client.enter(line, False)
        self.server.connect()
        self.arrive(
            f":s CAP * ACK :{self.CAPS}", ":s 001 bob :Welcome", *self.IN, "BATCH +1 chathistory #chat", "BATCH -1"
        )
        said: list[str] = []
        while len(said) < len(lines):
            now = self.said
            self.assertGreater(len(now), 0, "it waits for no answer")
            self.assertLess(sum(map(len, self.lines)), chat.FLOOD_BYTES)
            self.lines.clear()
            said += [message.text for message in now]
            self.arrive(*[f"@{chat.ID_TAG}={message.tags[chat.ID_TAG]} :bob!b@h PRIVMSG #chat :x" for message in now])
        self.assertEqual((said, self.lines, self.queued), (lines, [], []))

    def test_our_server_lets_us_in_again_within_two_round_trips(self) -> None:
        self.arrive("@msgid=m1 :ann!a@b PRIVMSG #chat :one")
        self.server.close()
        self.client.enter("two", True)
        self.lines.clear()
        self.server.connect()
        self.assertEqual([line.partition(" ")[0] for line in self.lines], ["CAP", "RESUME", "NICK", "USER", "CAP"])
        self.lines.clear()
        self.arrive(f":s CAP * ACK :{self.CAPS}", ":s 001 bob :Welcome", *self.IN)
        self.assertEqual(self.lines, ["JOIN #chat", "CHATHISTORY AFTER #chat msgid=m1 :100"])
        self.arrive(":s BATCH +1 chathistory #chat", ":s BATCH -1")
        self.assertEqual([message.params for message in self.said], [("#chat", "two")])


class AtAStrictServer(PersonCase):
    """One that throws out who is too fast, or too far ahead of what it has read: InspIRCd as installed."""

    THRESHOLD, RECVQ = 10, 8192  # lines at once, then one each second; bytes that may wait

    def setUp(self) -> None:
        self.now = time.monotonic()
        patch = mock.patch.object(chat.time, "monotonic", lambda: self.now)  # type: ignore[attr-defined]
        patch.start()
        self.addCleanup(patch.stop)
        super().setUp()

    def texts_read(self, seconds: int) -> list[str]:
        """Lets the server read, and the client do what is due; returns what was said."""
        penalty, read = 0.0, []
        for _ in range(seconds):
            penalty = max(penalty - 1, 0)
            while self.lines and penalty < self.THRESHOLD:
                read.append(chat.parse(self.lines.pop(0)))
                penalty += read[-1].command != "PING"
                if read[-1].command == "PING":
                    self.arrive(f":s PONG s :{read[-1].text}")
            for _ in range(10):
                self.now += 0.1
                self.server.turn()
            self.assertLessEqual(sum(len(line) + 2 for line in self.lines), self.RECVQ)
        return [message.text for message in read if message.command == "PRIVMSG"]

    def test_a_long_paste_arrives(self) -> None:
        for caps in ("", "echo-message message-tags"):
            self.enter(caps)
            lines = [f"{number} {'x' * 380}" for number in range(100)]
            self.type(*lines)
            self.assertEqual(len(self.said), 5)
            self.assertEqual(self.texts_read(110), lines)

    def test_what_is_urgent_does_not_wait(self) -> None:
        self.type(*map(str, range(100)))
        self.play("PING x", "/quit")
        self.assertEqual(self.lines[-2:], ["PONG x", "QUIT"])
        self.assertLess(len(self.lines), 10)

    def test_our_own_server_is_not_spared(self) -> None:
        self.enter(chat.RESUME_CAP)
        self.type(*map(str, range(100)))
        self.assertEqual(len(self.said), 100)


class FromAHostileServer(PersonCase):
    def test_hostile_remarks(self) -> None:
        self.start()
        self.server.connect()
        written = self.arrive(":bob!b@h NICK :\x1b]0;owned\x07", ":s 001 \x1b[2J :hi")
        self.assertNotIn("\x1b]", written)
        self.assertIn("\\x1b", written)
        for line in (":s 432 * x :no", ":s 403 bob #chat :\x1b no"):
            with self.assertRaises(chat.FatalError):
                self.arrive(line)

    def test_a_hostile_server_fills_no_memory(self) -> None:
        with mock.patch.object(chat, "MAX_MEMBERS", 6), mock.patch.object(chat, "MAX_ROOMS", 3):
            for number in range(5):
                self.arrive(f":n{number}!a@b JOIN #chat", f":s 353 bob = #chat :m{number} {'x' * 200}")
                self.arrive(f":bob!b@h JOIN #o{number}", f":bob!b@h JOIN #{'x' * 200}")
                self.arrive(f":s 353 bob = #o{number} :ann eve", f":eve!e@h JOIN #o{number}")
        self.assertEqual(self.members, ["bob", "ann", "n0", "m0"])
        self.assertEqual([room.name for room in self.client.rooms.others()], ["#o0", "#o1"])
        self.assertEqual([len(room.members) for room in self.client.rooms.others()], [2, 0])
        self.start()
        self.server.connect()
        for _ in range(10):
            self.arrive("CAP * LS * :echo-message echo-message batch")
        self.assertEqual(self.client.uplink.caps, {"batch", "echo-message"})
        with self.assertRaises(chat.FatalError):
            for _ in range(chat.SAME_NAMES + 1):
                self.arrive(f":s 433 * {self.client.uplink.nick} :taken")

    def test_a_server_that_does_not_take_us_back_fills_no_memory(self) -> None:
        with mock.patch.object(chat, "MAX_ROOMS", 3), mock.patch.object(chat, "MAX_MEMBERS", 6):
            for number in range(4):
                self.arrive(*(f":bob!b@h JOIN #{name}{number}" for name in "abcd"))
                self.arrive(*(f":s 353 bob = #{name}{number} :u1 u2 u3" for name in "abcd"))
                self.reconnect()
                self.assertLessEqual(len(self.lines), 3 + 1)  # and where we want to be

    def test_what_is_no_name_of_a_channel(self) -> None:
        for line in (":bob!b@h JOIN :", ":bob!b@h JOIN :#b eve", ":bob!b@h JOIN :#b,eve", ":s 470 bob #chat :#b eve"):
            self.arrive(line)
            self.assertEqual((self.prompt, self.client.rooms.pending), ("[#chat 2] bob> ", ""), line)
        self.type("/join tea")
        self.assertEqual(self.lines, ["JOIN #tea"])

    def test_before_the_welcome_nobody_is_in_a_channel(self) -> None:
        self.lose()
        self.server.connect()
        self.arrive(":bob!b@h JOIN #chat", ":s CAP * LS :")
        self.lines.clear()
        self.arrive(":s 001 bob :Welcome")
        self.assertEqual((self.lines, self.prompt), (["JOIN #chat"], "[connecting] bob> "))

    def test_a_nick_that_is_too_long_is_not_kept(self) -> None:
        self.arrive(f":ann!a@b NICK {'a' * 1000}")
        self.assertEqual(self.members, ["bob"])

    def test_a_server_that_does_not_read_is_left(self) -> None:
        with mock.patch.object(chat, "CLIENT_SENDQ", 1 << 16):
            for _ in range(1000):
                with contextlib.suppress(OSError):
                    self.server.sock.send(b"PING :x\r\n" * 1000)
                self.client.turn(time.monotonic())
                if not self.client.uplink.sock:
                    break
                self.assertLess(len(self.client.uplink.sendq), chat.CLIENT_SENDQ)
            self.assertIsNone(self.client.uplink.sock)
        self.assertIn("host:1 does not read what it is sent; trying again", self.screen.written)

    def test_names_that_are_not_to_be_had(self) -> None:
        long = "abcdefghijkl"
        for caps, first, answers, sent in (
            ("", "bob", "433 * bob,436 * bob2,437 * bob3", "bob2 bob3 bob4"),
            ("", "José", "432 * José,433 * Jose", "Jose Jose2"),
            ("", "Josephine-Alexandra", "432 *,433 * Josephine,433 * Josephin2", "Josephine Josephin2 Josephin3"),
            ("", long, "433 * abcdefghi,433 * abcdefgh2", "abcdefgh2 abcdefgh3"),  # it cuts names itself
            (chat.RESUME_CAP, long, "433 * abcdefghi", ""),  # which our server does not
            ("", "bob", "433 * bob,433 * bob", "bob2"),  # an old answer
        ):
            with self.subTest(first, answers=answers):
                self.start(first)
                self.server.connect()
                self.arrive(f":s CAP * LS :{caps}", *([f":s CAP * ACK :{caps}"] if caps else []))
                self.lines.clear()
                self.assertNotIn("***", self.arrive(*(f":s {answer} :no" for answer in answers.split(","))))
                self.assertEqual(self.lines, [f"NICK :{name}" for name in sent.split()])
        for first, line in (("Борис", "432 * Борис"), ("bob", "432 * bob"), ("bob", "437 * #chat"), ("bob", "431 *")):
            self.start(first)
            self.server.connect()
            with self.subTest(line):
                self.assertRaises(chat.FatalError, self.arrive, f":s {line} :no")

    def test_a_clock_behind_does_not_repeat_the_date(self) -> None:
        yesterday = chat.server_time(time.time() - 86400)
        for _ in range(3):
            self.assertNotIn("---", self.arrive(f"@time={yesterday} :ann!a@b PRIVMSG #chat :x"))

    def test_a_server_without_echo_is_asked_by_ping(self) -> None:
        for text in ("one", "two", "three"):
            self.assertIn(f": {text}\n", self.type(text))  # shown at once
        ids = [pending.id for pending in self.client.queue.messages]
        self.assertEqual([line for line in self.lines if "PING" in line], [f"PING {ids[0]}"])
        self.lines.clear()
        self.play(f":s PONG s :{ids[0]}", ":s PONG s :else")
        self.assertEqual((self.lines, len(self.queued)), ([f"PING {ids[2]}"], 2))
        self.assertIn("your last 2 lines may be lost: this server confirms nothing", self.lose())

    def test_keys_of_the_windows_console(self) -> None:
        alt, ctrl, alt_gr, shift = 0x2, 0x8, 0x9, 0x10
        up = (0, 0x41, ord("a"), 0)
        for events, text in (
            ([(1, 0x41, ord("a"), 0), up], "a"), ([(1, 0, 0xE0, 0)], "\xe0"), ([(1, 0x25, 0, 0)], LEFT),
            ([(1, 0x25, 0, ctrl)], "\x1b[1;5D"), ([(1, 0x2E, 0, 0)], DELETE), ([(1, 0x42, ord("b"), alt)], "\x1bb"),
            ([(1, 0x51, ord("@"), alt_gr)], "@"), ([(1, 9, 9, shift)], "\x1b[Z"), ([(1, 0x70, 0, 0), up], ""),
            ([(1, 0, 0xD83D, 0), (1, 0, 0xDE00, 0)], "\U0001f600"), ([(0, 0x12, 0xE9, 0)], "\xe9"),
            ([(1, 0, ord(char), 0) for char in "hi\r"], "hi\r"),
            ([(1, 0, ord(char), 0) for char in "/a\rb\r"], "\x1b[200~/a\rb\r\x1b[201~"),
        ):  # fmt: skip
            self.assertEqual(chat.windows_keys(events), text)

    def test_windows(self) -> None:
        """The calls of its console, as far as they can be played here."""
        modes = {-10: 0x1F7, -11: 0x3}
        keys = [b"\1\0\0\0" + struct.pack("iHHHHI", 1, 1, 0x41, 0, ord(char), 0) for char in "ab"]

        def get_mode(handle: int, mode: Any) -> int:
            mode._obj.value = modes.get(handle, 0)
            return handle in modes

        def read(handle: int, records: Any, most: int, count: Any) -> int:
            ctypes.memmove(records, keys[0] + b"\2".ljust(20, b"\0"), 40)  # a key, and the mouse
            count._obj.value = 2
            del keys[0]
            return 1

        kernel = mock.Mock(GetStdHandle=int, GetConsoleMode=get_mode, ReadConsoleInputW=read)
        kernel.SetConsoleMode.side_effect = lambda handle, mode: modes.update({handle: mode}) or 1
        kernel.WaitForSingleObject.side_effect = lambda *_: 0 if keys else 258
        modules = mock.patch.dict(sys.modules, msvcrt=mock.Mock(get_osfhandle=lambda fileno: fileno))
        windll = mock.patch("ctypes.windll", mock.Mock(kernel32=kernel), create=True)
        elsewhere = mock.patch.object(shutil, "which", lambda name: None)  # which calls Windows since Python 3.12
        with modules, mock.patch.object(sys, "platform", "win32"), windll, elsewhere:
            windows: Any = types.ModuleType("chat_on_windows")
            sys.modules[windows.__name__] = windows
            exec(compile(SOURCES[chat], "chat.py", "exec"), windows.__dict__)
            self.assertTrue(windows.can_draw())
            self.assertEqual(modes[-11], 0x7)
            saved = windows.raw_mode()
            self.assertEqual(modes[-10] & 0x217, 0x1)
            self.assertEqual(windows.read_keys(), "ab")
            windows.restore_mode(saved)
            self.assertEqual(modes[-10], 0x1F7)
            for stream, there in ((-10, True), (5, False)):  # the other is NUL
                fake = mock.Mock(isatty=lambda: True, fileno=lambda: stream)  # noqa: B023
                self.assertEqual(windows.is_terminal(fake), there)
            self.assertFalse(windows.is_terminal(None))


class FuzzClient(unittest.TestCase):
    """Whatever a server sends and a person types, the client goes on, or ends with one clear line."""

    # What a screen is sent by ourselves; all else is text.
    OURS = re.compile(r"\x1b[78]|\x1b\[(?:\d+A|[JKH]|2J|(?:0|1|2|9[15]|(?:1;(?:7;)?)?38;5;\d+)m)|[\r\n\a]")
    KEYS = [
        *chat.BINDINGS, *"ab éß你😀\u0301\u202e/#", "\x1b", "\x1b[", "\x1b[9", "\x1bO", chat.CANCEL, "y", "\x1b[200~",
        "\x1b]", "\x1bP", "\x1b[[", "\x1b[M",
        "\x1b[201~", "\x1b[200~one\rtwo\x1b[201~", "\x1b[200~\x1b[5m\x1b[201~", "\0", "\x7f" * 9, "/ignore ann\r",
        "/who\r", "/join #a\r", "/join #b\r", "/part\r", "/msg ann hi\r", "/reply ho\r", "ann: hi\r", "exit\r",
    ]  # fmt: skip
    SERVERS = [
        [], [":s CAP * LS :echo-message message-tags", ":s CAP * ACK :echo-message message-tags"],
        [f":s CAP * LS :{' '.join(chat.CAPABILITIES)}", f":s CAP * ACK :{' '.join(sorted(chat.WANTED_CAPS))}"],
    ]  # fmt: skip
    IN = [
        ":s 001 bob :Welcome", ":bob!b@h JOIN #a", ":bob!b@h JOIN #chat", ":s 353 bob = #chat :bob @ann",
        ":s 353 bob = #a :bob ann u1", "BATCH +1 chathistory #a", "@batch=1;msgid=1 :u1!a@b PRIVMSG #a :1", "BATCH -1",
    ]  # fmt: skip

    def setUp(self) -> None:
        patch = mock.patch.object(chat.PipeUI, "_read", lambda ui: None)
        patch.start()
        self.addCleanup(patch.stop)

    def test_keys_however_they_are_cut(self) -> None:
        for seed in seeds(100_000 if LONG else 300):
            with repeatable(seed) as rng:
                text = "".join(rng.choices(self.KEYS, k=20))
                cuts = [0, *sorted(rng.choices(range(len(text)), k=rng.randrange(9))), len(text)]
                keys = chat.KeyParser()
                editor = chat.LineEditor(lambda head: (len(head) // 2, ["ann", ""]))
                found = [key for start, end in zip(cuts, cuts[1:]) for key in keys.feed(text[start:end])]
                self.assertEqual(found, chat.KeyParser().feed(text))
                for key in found:
                    editor.handle_key(key)
                    _, shown, cursor = editor.view()
                    self.assertIn(cursor, range(len(shown) + 1))

    def test_at_a_terminal(self) -> None:
        for seed in seeds(10000 if LONG else 60):
            with repeatable(seed) as rng:
                client = chat.Client("host", 1, "bob", "#chat")
                screen = FakeTerminal(client)
                client.ui = chat.TerminalUI(client, screen)
                self.live(rng, client, functools.partial(self.press, screen))
                self.harmless(self.OURS.sub("", screen.written))

    def test_in_a_pipe(self) -> None:
        for seed in seeds(10000 if LONG else 60):
            with repeatable(seed) as rng:
                as_json = seed % 2 == 0
                client, err = chat.Client("host", 1, "bob", "#chat"), io.StringIO()
                out = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n")
                client.ui = ui = chat.PipeUI(client, None, rng.random() < 0.5, as_json)
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    self.live(rng, client, functools.partial(self.pipe, ui))
                    out.flush()
                shown = out.buffer.getvalue().decode()
                for line in shown.splitlines() if as_json else ():
                    json.loads(line)
                self.harmless((shown + err.getvalue()).replace("\n", ""))

    def harmless(self, text: str) -> None:
        self.assertEqual([char for char in text if obeyed(char)], [])

    def press(self, terminal: chat.Terminal, soup: Soup) -> None:
        pause = soup.rng.choice((0.0, 0.0, 1.0))
        terminal._input.put(("".join(soup.rng.choices(self.KEYS, k=soup.rng.randrange(1, 6))), pause))

    def pipe(self, ui: chat.PipeUI, soup: Soup) -> None:
        if ui._lines.empty():
            ui._lines.put(soup.line([soup.plain]) if soup.rng.random() < 0.9 else None)

    def live(self, rng: random.Random, client: chat.Client, type_some: Callable[[Soup], Any]) -> None:
        """Fifty things that happen to a client."""
        soup, server = Soup(rng), Dialed(client)
        client.replay = rng.choice((0, 20))
        welcome = [*rng.choice(self.SERVERS), *self.IN]
        with contextlib.suppress(chat.FatalError), contextlib.ExitStack() as stack:
            stack.callback(server.clean_up)
            server.connect()
            server.arrive(*(welcome if rng.random() < 0.8 else []))
            for _ in range(50):
                happens = rng.random()
                if happens < 0.65:
                    line = soup.line([soup.from_server])
                    server.arrive(re.sub("[\r\n]", " ", line.decode(errors="replace")))
                elif happens < 0.85:
                    type_some(soup)
                elif happens < 0.88:
                    client.turn(time.monotonic() + rng.choice((0.1, 5, 40)))
                elif happens < 0.93:
                    server.close()
                    server.connect()
                    server.arrive(*(welcome if rng.random() < 0.5 else []))
                else:
                    server.arrive(*rng.sample(welcome, rng.randrange(len(welcome))))
                if client.status is not None:
                    return
                server.turn()


def held_port(case: unittest.TestCase) -> int:
    """A port that nobody else is given during a test, for a server that can be told to share it (SO_REUSEADDR)."""
    sock = socket.socket()
    case.addCleanup(sock.close)
    if sys.platform != "win32":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    port: int = sock.getsockname()[1]
    if sys.platform == "win32":
        sock.close()
    return port


class ProgramCase(Waiting):
    """Whole programs as a user starts them."""

    CHAT = str(HERE / "chat.py")  # or the same, compiled: half of a start is that

    def start(
        self, *args: str, stdin: Any = subprocess.DEVNULL, file: str = "chat.py", **more: Any
    ) -> subprocess.Popen[str]:
        command = [sys.executable, self.CHAT if file == "chat.py" else str(HERE / file), *args]
        streams = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        program = subprocess.Popen(command, text=True, encoding="utf-8", **streams)
        self.addCleanup(self.end, program)
        return program

    def end(self, program: subprocess.Popen[str]) -> None:
        if program.poll() is None:
            program.kill()
        program.communicate(timeout=PATIENCE)

    @staticmethod
    def finish(program: subprocess.Popen[str], text: str = "") -> tuple[int, str, str]:
        """Waits until a program ends; returns its status, and what it wrote."""
        out, err = program.communicate(text or None, timeout=PATIENCE)
        return program.returncode, out, err

    def complains(self, *args: str, status: int = 1, **more: Any) -> str:
        """Returns what a program writes to standard error that ends with a status, and tells nothing else."""
        found, out, err = self.finish(self.start(*args, **more))
        self.assertEqual((found, out), (status, ""), err)
        return err

    def server(self, *args: str, **more: Any) -> tuple[subprocess.Popen[str], int]:
        program = self.start("server", "--port", "0", *args, **more)
        assert program.stdout
        first = program.stdout.readline()
        self.assertRegex(first, r"^listening on 127\.0\.0\.1:\d+$")
        return program, int(first.rpartition(":")[2])

    def client(self, port: int, *args: str, **more: Any) -> subprocess.Popen[str]:
        """A client called bob, with a pipe for its input."""
        return self.start("client", "--port", str(port), "--name", "bob", *args, stdin=subprocess.PIPE, **more)

    def run_client(self, port: int, text: str = "", *args: str) -> tuple[int, str, str]:
        return self.finish(self.start("client", "--port", str(port), *args, stdin=subprocess.PIPE), text)

    def peer(self, port: int, data: str = "", until: str = "") -> Peer:
        peer = Peer(port, data)
        self.addCleanup(peer.close)
        if until:
            peer.until(until)
        return peer

    def ann(self, port: int) -> Peer:
        """Ann, who has joined, and speaks plain text."""
        return self.peer(port, "ann\n", "joined")

    def make_folder(self) -> pathlib.Path:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        return pathlib.Path(folder.name)


class ServerProgram(ProgramCase):
    @NEEDS_SIGNALS
    def test_server_tells_how_to_join_and_stops_on_sigterm(self) -> None:
        program, port = self.server()
        ann = self.ann(port)
        if hasattr(signal, "SIGHUP"):  # which does no harm without a log file
            program.send_signal(signal.SIGHUP)
        ann.send("/who\n")
        ann.until("*** In #chat: @ann")
        program.send_signal(signal.SIGTERM)
        self.assertEqual(ann.rest()[-1], "*** Server is shutting down")
        ann.close()
        assert program.stdout and program.stderr
        out, err = program.stdout.read(), program.stderr.read()  # all of it: a part is in a buffer since the first line
        self.assertEqual(program.wait(PATIENCE), 0)
        self.assertRegex(err, r"\n[-0-9]+ [:,0-9]+ INFO ann from 127\.0\.0\.1 joined\n")
        self.assertIn("only this machine can join; --host 0.0.0.0 opens the chat to the network", out)
        self.assertIn(f"nc 127.0.0.1 {port}\n", out)

    def test_port_taken(self) -> None:
        _, port = self.server()
        told = f"chat.py: port {port} is taken; choose another with --port, or any with --port 0\n"
        self.assertEqual(self.complains("server", "--port", str(port)), told)

    def test_a_log_that_cannot_be_opened_is_told_before_the_port_is_bound(self) -> None:
        _, port = self.server()
        folder = self.make_folder()
        for path in map(str, (folder, folder / "no" / "such")):
            with self.subTest(path):
                err = self.complains("server", "--port", str(port), "--log", path)
                self.assertRegex(err, rf"^chat\.py: --log {re.escape(path)}: [^\n]*[a-z]\n$")
                self.assertNotIn(f"port {port}", err)

    @NEEDS_SIGNALS
    def test_who_is_warned_of_a_server_without_a_password(self) -> None:
        for secret, warnings in (("", 1), ("sesame", 0)):
            environment = {**os.environ, "CHAT_PASSWORD": secret}
            program = self.start("server", "--host", "0.0.0.0", "--port", "0", env=environment)
            assert program.stdout
            program.stdout.readline()
            program.terminate()
            _, _, err = self.finish(program)
            self.assertEqual(err.count("there is no password: whoever reaches 0.0.0.0 can join"), warnings)
            self.assertNotIn("sesame", err)

    def test_wrong_usage(self) -> None:
        port = "argument -p/--port: it must be a whole number from 0 to 65535, not"
        for args, told in (
            ("dance", "'dance' (choose from"), ("server --port x", f"{port} x"),
            ("server --port 70000", f"{port} 70000"),
            ("server --max-clients 0", "must be a number of at least 0.01, not 0"),
            ("history f --since x", "a local time"),
            ("client --hots x", "--hots is not known: did you mean --host?"), ("server x", "x is not known"),
            ("client a b c", "it is HOST, HOST PORT, HOST:PORT or NICK@HOST"),
            ("client a:b", "it must be a whole number"),
            ("server --host [::1]:1:2", "--host: it is HOST"), ("client -p", "expected one argument"),
        ):  # fmt: skip
            with self.subTest(args):
                err = self.complains(*args.split(), status=2)
                self.assertIn(told, err)
                self.assertRegex(err, r"^chat\.py( \w+)?: [^\n]*; chat\.py( \w+)? --help tells more\n$")
        self.assertEqual(self.complains(status=2), f"{chat.EXAMPLES}\n")

    def test_each_limit_has_a_flag(self) -> None:
        fields = dataclasses.fields(chat.Limits)
        for number, field in enumerate(fields, 1):
            flag = field.metadata["flag"]
            for more, others in ([], chat.Limits()), (["--no-limits"], chat.Limits(*[math.inf] * len(fields))):
                limits = chat.limits_from_args(chat.parser().parse_args(["server", flag, str(number), *more]))
                self.assertEqual(limits, dataclasses.replace(others, **{field.name: number}))

    @unittest.skipUnless(hasattr(os, "fork"), "needs ulimit")
    def test_out_of_descriptors(self) -> None:
        import resource

        program, port = self.server(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
        peers = [self.peer(port) for _ in range(90)]
        self.assertEqual([peer.line() for peer in peers[-10:]], [f"ERROR :{chat.FULL}"] * 10)
        if os.path.exists("/proc"):
            used = self.processor_seconds(program.pid)
            time.sleep(1)  # in which it has nothing to do
            self.assertLess(self.processor_seconds(program.pid) - used, 0.3, "it spins")
        for peer in peers:
            peer.close()
        recovered = functools.partial(self.peer, port, "ann\n")
        self.eventually(lambda: recovered().line() == "*** ann joined (1 here)", "the server did not recover")
        program.terminate()
        status, _, err = self.finish(program)
        self.assertEqual(status, 0)
        self.assertNotIn("Traceback", err)

    @staticmethod
    def processor_seconds(pid: int) -> float:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @unittest.skipUnless(shutil.which("nc"), "needs nc")
    def test_printf_into_nc(self) -> None:
        _, port = self.server()
        ann = self.ann(port)
        nc = ["nc", "-N", "127.0.0.1", str(port)]
        subprocess.run(nc, input=b"bob\nhello", stdout=subprocess.DEVNULL, timeout=PATIENCE, check=True)
        ann.until("bob: hello")


class ServerLog(ProgramCase):
    """What a server writes down, and what that may not do to it."""

    def test_what_is_logged(self) -> None:
        path = self.make_folder() / "log"
        for args in ((), ("--log", str(path), "-v")):
            program, port = self.server(*args)
            self.ann(port)
            self.peer(port, "NICK eve\r\nUSER x 0 * :x\r\nQUIT :gone\x1b[2J\r\n").rest()
            self.peer(port, "\x16\x03").rest()
            program.terminate()
            _, _, err = self.finish(program)
            lines = (path.read_text(encoding="utf-8") if args else err).splitlines()
            told = [line.partition(" INFO ")[2] for line in lines if " INFO " in line]
            begun = f"{chat.VERSION}, Python {platform.python_version()}: listening on 127.0.0.1:{port}; "
            begun += "history in memory, no password, no TLS"
            joined = [f"{name} from 127.0.0.1 joined" for name in ("ann", "eve")]
            self.assertEqual(told[:4], [begun, *joined, "eve from 127.0.0.1 left: Quit: gone\\x1b[2J"])
            self.assertTrue(os.name != "posix" or "stopped by SIGTERM" in told, told)
            self.assertIn("TLS", "\n".join(lines))

    @unittest.skipUnless(sys.platform == "linux", "needs Linux")
    def test_a_log_that_nobody_reads_stops_nothing(self) -> None:
        import fcntl

        program, port = self.server("-v")
        assert program.stderr
        fcntl.fcntl(program.stderr, 1031, 4096)  # F_SETPIPE_SZ, which Python knows since 3.10
        for number in range(200):
            peer = Peer(port, f"ann{number}\nexit\n")
            self.assertEqual(peer.rest()[-1], "*** Goodbye")
            peer.close()
        program.terminate()
        self.assertEqual(program.wait(PATIENCE), 0)

    def test_what_the_log_cannot_take_is_left_out_and_nobody_waits_for_it(self) -> None:
        taking, written = threading.Event(), threading.Semaphore(0)
        texts: list[str] = []

        def emit(record: logging.LogRecord) -> None:
            texts.append(record.getMessage())
            written.release()
            taking.wait(PATIENCE)

        handler = logging.Handler()
        records: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.addCleanup(setattr, logging, "raiseExceptions", logging.raiseExceptions)
        with mock.patch.object(handler, "emit", emit), mock.patch.object(chat, "log_records", records):
            end = chat.begin_log(handler, verbose=False)
            self.addCleanup(taking.set)
            chat.log_later(logging.INFO, "%s", "first")
            self.assertTrue(written.acquire(timeout=PATIENCE))
            for number in range(chat.LOG_QUEUE + 5):  # of a kind each, so that none is too much
                chat.log_later(logging.INFO, f"{number} %s", OSError("gone"))
            self.assertEqual(records.qsize(), chat.LOG_QUEUE)
            with mock.patch.object(chat, "LOG_END_S", 0.01):
                self.assertFalse(end())
            taking.set()
            with mock.patch.object(chat, "LOG_END_S", PATIENCE):
                self.assertTrue(end())
        self.assertEqual(texts, ["first", *(f"{number} gone" for number in range(chat.LOG_QUEUE))])

    def test_a_line_of_the_log(self) -> None:
        self.addCleanup(setattr, logging, "raiseExceptions", logging.raiseExceptions)
        when = time.mktime((2026, 1, 31, 12, 0, 0, 0, 0, -1)) + 0.25
        for verbose in (False, True):
            out = io.StringIO()
            clock = mock.patch.multiple(time, time=lambda: when, monotonic=lambda: when)
            with mock.patch.object(chat, "log_records", queue.SimpleQueue()), clock:
                chat.log_later(logging.DEBUG, "%s left", "ann")
                for _ in range(chat.LOG_BURST + 1):
                    chat.log_later(logging.WARNING, "refused %s: %s", "ann", OSError("full"))
                self.assertTrue(chat.begin_log(logging.StreamHandler(out), verbose)())
            lines = ["2026-01-31 12:00:00,250 DEBUG ann left"] * verbose
            lines += ["2026-01-31 12:00:00,250 WARNING refused ann: full"] * chat.LOG_BURST
            self.assertEqual(out.getvalue().splitlines(), lines)

    def test_nobody_fills_the_log(self) -> None:
        calm, clock = chat.RateLimitFilter(), 1000.0
        records = [logging.makeLogRecord({"msg": "%s left", "args": (str(n),)}) for n in range(1000)]
        other = logging.makeLogRecord({"msg": "another"})
        with mock.patch.object(time, "monotonic", lambda: clock):
            self.assertEqual(sum(map(calm.filter, records[:998])), chat.LOG_BURST)
            self.assertTrue(calm.filter(other))
            clock += chat.LOG_INTERVAL_S
            self.assertEqual([calm.filter(record) for record in records[998:]], [True, False])
        left_out = 998 - chat.LOG_BURST
        self.assertEqual(records[998].getMessage(), f"998 left ({left_out} more like this are not shown)")

    def test_a_second_server_says_that_the_history_is_in_use(self) -> None:
        path = str(self.make_folder() / "history")
        self.server("--history", path)
        err = self.complains("server", "--port", "0", "--history", path)
        self.assertEqual(err, f"chat.py: cannot use {path} as a history: another server uses it\n")


class ServerStart(ProgramCase):
    """What a server is told at its start, and by signals."""

    def test_a_password_that_cannot_be_given_is_refused_at_the_start(self) -> None:
        path = self.make_folder() / "password"
        none, unusable = f"there is no password in {path}", "the password cannot be used:"
        exits, control = "whoever types exit leaves", "there is a control character in it, which cannot be typed"
        long = "an IRC line has room for 504 bytes of it"
        for data, why in (
            (b"\n", none), (b"\xef\xbb\xbf\n", none), (b"exit\n", f"{unusable} {exits}"),
            (b" exit\n", f"{unusable} {exits}"), (b"a\0b\n", f"{unusable} {control}"),
            (b"a\tb\n", f"{unusable} {control}"), (b"x" * 505, f"{unusable} {long}"),
            ("é".encode() * 253, f"{unusable} {long}"),
        ):  # fmt: skip
            with self.subTest(data):
                path.write_bytes(data)
                err = self.complains("server", "--port", "0", "--password-file", str(path))
                self.assertEqual(err, f"chat.py: {why}\n")
        if os.name == "posix":
            environment = {**os.environb, b"CHAT_PASSWORD": b"\xf6pen", b"PYTHONUTF8": b"1"}
            err = self.complains("server", "--port", "0", env=environment)
            self.assertEqual(err, f"chat.py: {unusable} it is not UTF-8 text\n")

    def test_what_cannot_start_leaves_nothing_open(self) -> None:
        _, port = self.server()
        folder = self.make_folder()
        log, history, missing = (str(folder / name) for name in ("log", "history", "no/such"))
        chat.SqliteHistory(history).close()
        told = {**os.environ, "PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}  # of databases since Python 3.13
        for args, why in (
            (("server", "--history", history, "--log", missing), f"--log {missing}"),
            (("server", "--history", missing, "--log", log), f"cannot use {missing}"),
            (("server", "--history", history, "--log", log, "--port", str(port)), f"port {port} is taken"),
            (("history", __file__), f"cannot use {__file__}"),
        ):
            with self.subTest(args):
                self.assertRegex(self.complains(*args, env=told), rf"\Achat\.py: {re.escape(why)}[^\n]*\n\Z")
        self.assertEqual(self.finish(self.start("history", history, env=told)), (0, "", ""))

    def test_the_longest_password(self) -> None:
        path, longest = self.make_folder() / "password", "é" * 252
        path.write_bytes(b"\xef\xbb\xbf" + longest.encode() + b"\r\nmore\n")
        _, port = self.server("--password-file", str(path))
        self.peer(port, f"PASS :{longest}\r\nNICK ann\r\nUSER a 0 * :a\r\n", " 001 ")
        path.write_bytes(("e\u0301" * 252).encode())  # too long for the line, but for normalising it
        status, _, err = self.run_client(port, "hi\n", "--password-file", str(path))
        self.assertEqual((status, err), (0, ""))

    @unittest.skipUnless(hasattr(signal, "SIGHUP"), "needs SIGHUP")
    def test_sighup_reopens_the_log_and_ends_nothing(self) -> None:
        folder = self.make_folder()
        path = folder / "logs" / "log"
        path.parent.mkdir()
        program, port = self.server("--log", str(path))
        ann = self.ann(port)
        for number in range(3):
            self.logged(path, "INFO")
            old = path.with_name(f"log.{number}")
            path.rename(old)
            program.send_signal(signal.SIGHUP)
            self.eventually(path.exists, "the log was not opened again")
            self.peer(port, f"bob{number}\nexit\n").rest()
            self.logged(path, f"bob{number} from")
            self.assertNotIn(f"bob{number}", old.read_text(encoding="utf-8"))
        gone = path.parent.rename(folder / "gone")  # where it cannot be opened
        program.send_signal(signal.SIGHUP)
        self.peer(port, "eve\nexit\n").rest()
        gone.rename(path.parent)
        self.peer(port, "fay\nexit\n").rest()
        self.logged(path, "fay from")
        ann.send("/who\n")
        ann.until("*** In #chat: @ann")
        program.terminate()
        self.assertEqual(program.wait(PATIENCE), 0)

    def logged(self, path: pathlib.Path, text: str) -> None:
        self.eventually(lambda: path.exists() and text in path.read_text(encoding="utf-8"), f"{text} is not logged")


def luminance(colour: str) -> float:
    """The relative luminance of rrggbb: WCAG 2.1."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """How well two colours can be told apart, from 1 to 21: WCAG 2.1."""
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


class Colours(unittest.TestCase):
    """Names can be read on a black and on a white ground."""

    PALETTES = {
        "xterm": "000000 cd0000 00cd00 cdcd00 0000ee cd00cd 00cdcd e5e5e5 "
        "7f7f7f ff0000 00ff00 ffff00 5c5cff ff00ff 00ffff ffffff",
        "VGA": "000000 aa0000 00aa00 aa5500 0000aa aa00aa 00aaaa aaaaaa "
        "555555 ff5555 55ff55 ffff55 5555ff ff55ff 55ffff ffffff",
    }

    def test_of_256(self) -> None:
        steps = (0, 95, 135, 175, 215, 255)
        for look in chat.NAME_COLOURS:
            number = int(look.rpartition(";")[2]) - 16
            colour = "".join(f"{steps[level]:02x}" for level in (number // 36, number // 6 % 6, number % 6))
            self.assertGreater(min(contrast(colour, "000000"), contrast(colour, "ffffff")), 4, look)
        self.assertEqual(len(set(chat.NAME_COLOURS)), 12)

    def test_of_16(self) -> None:
        for name, palette in self.PALETTES.items():
            for look in (*chat.FEW_COLOURS, str(chat.RED), str(chat.MAGENTA)):
                colour = palette.split()[int(look) - (82 if int(look) > 37 else 30)]
                self.assertGreater(min(contrast(colour, "000000"), contrast(colour, "ffffff")), 2.5, (name, look))


@unittest.skipUnless(sys.platform == "linux" and shutil.which("unshare") and shutil.which("ip"), "needs namespaces")
class WithoutARoute(ProgramCase):
    """A machine without a default route, which only has neighbours."""

    SCRIPT = (
        'ip link set lo up; {}; exec "$@"',
        "ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up; ip address add {} dev v0",
    )

    def told(self, host: str, *addresses: str) -> list[str]:
        """What a server says on a machine with these addresses."""
        steps = [self.SCRIPT[1].format(addresses[0])] if addresses else []
        steps += [f"ip address add {address} dev v0" for address in addresses[1:]]
        script = self.SCRIPT[0].format("; ".join(steps) or ":")
        args = [sys.executable, self.CHAT, "server", "--host", host, "--port", "9090"]
        command = ["unshare", "--net", "sh", "-c", script, "sh", *args]
        program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.addCleanup(self.end, program)
        assert program.stdout
        first = program.stdout.readline()
        if not first and "permitted" in program.communicate()[1]:
            self.skipTest("may not make a network namespace")
        self.assertIn("listening on", first)
        return list(itertools.takewhile(lambda line: "IRC client" not in line, program.stdout))

    def test_addresses_are_those_of_the_interfaces(self) -> None:
        four, six = "172.20.7.1", "fd00:7::5"
        for host, own in (("0.0.0.0", [four]), ("::", [four, six])):
            lines = self.told(host, f"{four}/24", f"{six}/64 nodad")
            shown = [re.search(r"--host (\S+)", line) for line in lines if "client" in line]
            self.assertEqual([match and match[1] for match in shown], own)

    def test_none_is_known(self) -> None:
        lines = self.told("0.0.0.0")
        self.assertEqual(
            lines[0], "no address of this machine is known here; for others, look for one with: ip address\n"
        )
        self.assertIn("http://127.0.0.1:9090/", lines[1])


@unittest.skipUnless(socket.has_ipv6, "needs IPv6")
class Listening(ServerCase):
    """A server at a name that has several addresses."""

    def setUp(self) -> None:
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError as error:
            self.skipTest(str(error))

    @staticmethod
    def named(*hosts: str) -> Any:
        """Makes these the addresses of each name."""
        find = socket.getaddrinfo

        def found(host: Any, port: Any, *args: Any, **more: Any) -> list[Any]:
            return [item for address in hosts for item in find(address, port, *args, **more)]

        return mock.patch.object(socket, "getaddrinfo", found)

    def test_all_addresses_of_a_name_are_served_at_one_port(self) -> None:
        for hosts in (("::1", "127.0.0.1"), ("127.0.0.1", "::1"), ("127.0.0.1", "127.0.0.1", "::1")):
            with self.subTest(hosts):
                with self.named(*hosts):
                    self.serve(chat.Server("localhost", 0))
                self.assertEqual(self.server.address[0], hosts[0])
                for host in ("127.0.0.1", "::1"):
                    sock = socket.create_connection((host, self.port), PATIENCE)
                    self.addCleanup(sock.close)
                    Peer(self.port, f"n{len(host)}\n", sock).until(f"n{len(host)} joined")
                command = [sys.executable, ProgramCase.CHAT, "client", "--port", str(self.port), "-m", "hello"]
                for more in ([], ["--host", "localhost"], ["--host", "::1"]):
                    done = subprocess.run([*command, *more], timeout=PATIENCE, capture_output=True, check=False)
                    self.assertEqual((done.returncode, done.stderr), (0, b""), more)

    def test_an_address_that_this_machine_does_not_have_is_left_out(self) -> None:
        with self.named("192.0.2.1", "::1", "2001:db8::1"):
            self.serve(chat.Server("name", 0))
        self.assertEqual(self.server.listener.hosts, ["::1"])
        with self.named("192.0.2.1", "2001:db8::1"), self.assertRaises(OSError) as caught:
            chat.Server("name", 0)
        self.assertEqual(caught.exception.errno, errno.EADDRNOTAVAIL)

    def test_a_port_must_be_free_on_all_addresses(self) -> None:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken, self.named("127.0.0.1", "::1"):
            port = taken.getsockname()[1]
            with self.assertRaises(OSError) as caught:
                chat.Server("localhost", port)
            self.assertEqual(caught.exception.errno, errno.EADDRINUSE)
            socket.create_server(("127.0.0.1", port)).close()  # nothing was left there
            refused = iter([OSError(errno.EADDRINUSE, "taken")])

            def listen(family: int, *args: Any, listen: Any = chat.listen) -> socket.socket:
                for error in refused if family == socket.AF_INET6 else ():
                    raise error
                sock: socket.socket = listen(family, *args)
                return sock

            with mock.patch.object(chat, "listen", listen):
                self.serve(chat.Server("localhost", 0))  # at a port that it finds the second time
            self.assertEqual(self.server.listener.hosts, ["127.0.0.1", "::1"])

    def test_joining_is_told_for_each_address(self) -> None:
        text = chat.join_instructions(["::1", "127.0.0.1"], 9090, "", False)
        self.assertIn("only this machine can join", text)
        for host in ("127.0.0.1", "::1"):
            self.assertIn(f"  nc {host} 9090\n", text)
        self.assertIn("  a browser: http://[::1]:9090/\n", text)
        self.assertIn("  a browser: https://127.0.0.1:9/\n", chat.join_instructions(["127.0.0.1"], 9, "AB", True))
        self.assertNotIn("only this machine", chat.join_instructions(["127.0.1.1", "192.0.2.1"], 9090, "", False))


class ClientProgram(ProgramCase):
    def test_what_people_type_first(self) -> None:
        for words, host, port, name in (
            ("", "127.0.0.1", 9090, "me"), ("h", "h", 9090, "me"), ("h 99", "h", 99, "me"), ("h:99", "h", 99, "me"),
            ("bob@h", "h", 9090, "bob"), ("bob@h:99", "h", 99, "bob"), ("::1", "::1", 9090, "me"),
            ("[::1]:99", "::1", 99, "me"), ("--host h:99", "h", 99, "me"), ("-p 99 h", "h", 99, "me"),
            ("--nick bob h", "h", 9090, "bob"), ("h 99 --user bob", "h", 99, "bob"), ("h -p 99", "h", 99, "me"),
        ):  # fmt: skip
            with self.subTest(words), mock.patch.object(chat, "login_name", lambda: "me"):
                args = chat.parser().parse_args(["client", *words.split()])
                self.assertEqual((args.host, args.port, args.name), (host, port, name))
        for channel, name in (("tea", "#tea"), ("#tea", "#tea"), ("&tea", "&tea"), ("tea cup", "#tea")):
            args = chat.parser().parse_args(["client", "--channel", channel])
            self.assertEqual(chat.names_from_args(args)[1], name)
        status, out, _ = self.finish(self.start("--version"))
        self.assertEqual((status, out), (0, f"{chat.VERSION}, Python {platform.python_version()}\n"))
        unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        self.assertIn("to be called bob, say --name bob", chat.connect_error(unknown, "bob"))
        self.assertIn("is the server running", chat.connect_error(unknown, "bob.example"))

    def test_who_only_speaks_is_not_seen_to_come_and_go(self) -> None:
        _, port = self.server()
        say = ("--name", "ci", "--no-join", "-m", "build 42 is green")
        self.assertEqual(self.run_client(port, "", *say), (0, "", ""))  # nobody is there; it is said all the same
        ann = self.ann(port)
        ann.until("ci: build 42 is green")
        ann.until("End of what was said before")
        self.assertEqual(self.run_client(port, "one\ntwo\n", *say[:3]), (0, "", ""))
        self.assertEqual([ann.line() for _ in range(2)], ["ci: one", "ci: two"])
        ann.send("/mode +k sesame\n/who\n")
        self.assertEqual(ann.until("In #chat"), "*** In #chat: @ann")
        status, out, err = self.run_client(port, "", *say)  # who could not join cannot speak either
        self.assertEqual((status, out), (1, ""))
        self.assertRegex(err, r"^chat\.py: a line was not delivered: .*key[^\n]*\n$")

    def test_into_a_file_go_times_and_utf_8(self) -> None:
        _, port = self.server()
        ann = self.ann(port)
        folder = self.make_folder()
        for name, args, wanted in (
            ("eve", (), r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ann: \u00e9\\x1b<U\+202E>$"),
            ("joe", ("--json",), r'"text": "\u00e9\\u001b\\u202e"'),
        ):
            path = folder / "out"
            env = {**os.environ, "PYTHONIOENCODING": "latin-1:backslashreplace"} if args else None
            with path.open("wb") as file:
                own = ("--port", str(port), "--name", name)  # its input stays open, lest it leaves
                client = self.start("client", *own, *args, stdin=subprocess.PIPE, stdout=file, env=env)
                ann.until(f"{name} joined")
                ann.send("\u00e9\x1b\u202e\n")
                self.eventually(lambda: b"202e" in path.read_bytes().lower(), "it is not in the file")  # noqa: B023
                client.terminate()
                client.wait(PATIENCE)
            self.assertRegex(path.read_text(encoding="utf-8"), wanted)

    def test_a_pipe_sends_and_confirms_every_line(self) -> None:
        _, port = self.server()
        ann = self.ann(port)
        lines = [f"line {number} /\u00e9" for number in range(500)] + ["/not a command", "x " * 400]
        result = self.run_client(port, "\n".join(lines), "--name", "ci")
        self.assertEqual(result, (0, "*** ci joined (2 here)\n", ""))
        got = list(iter(lambda: ann.until("ci"), "*** ci left"))[1:]
        self.assertEqual(got[:501], [f"ci: {line}" for line in lines[:501]])
        self.assertEqual("".join(line[len("ci: ") :] for line in got[501:]).replace(" ", ""), "x" * 400)

    @unittest.skipUnless(socket.has_ipv6, "needs IPv6")
    def test_a_server_on_the_other_loopback_address_is_found(self) -> None:
        program = self.start("server", "--port", "0", "--host", "::1")
        assert program.stdout
        port = int(program.stdout.readline().rpartition(":")[2])
        for host in ((), ("--host", "localhost")):
            self.assertEqual(self.run_client(port, "", "--name", "ci", "-m", "hi", *host), (0, "", ""))

    def test_name_taken(self) -> None:
        _, port = self.server()
        ann = self.ann(port)
        result = self.run_client(port, "hi\n", "--name", "ann")
        self.assertEqual(result, (0, "*** ann2 joined (2 here)\n", "*** ann is taken; you are ann2\n"))
        ann.until("ann2: hi")

    def test_one_line_errors(self) -> None:
        unused = socket.socket()
        self.addCleanup(unused.close)
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for args, text in (
            (["client", "--port", str(port)], f"cannot connect to 127.0.0.1:{port}: "),
            (["client", "--host", "a..b"], "cannot connect to a..b:"),
            (["client", "--name", "b\udcff"], "a name is a letter, "),
            (["client", "--channel", "#\udcff"], "a channel is # and "),
            (["client", "--channel", "#chat a\r\nOPER x y"], "a channel's key is one word "),
            (["server", "--host", "a..b"], "cannot listen on a..b:"),
            (["server", "--server-name", "my chat"], "a --server-name is "),
        ):
            with self.subTest(args):
                self.assertRegex(self.complains(*args), rf"^chat\.py: {re.escape(text)}[^\n]*\n$")

    @NEEDS_SIGNALS
    def test_client_whose_server_ends(self) -> None:
        server, port = self.server()
        client = self.client(port, "--no-reconnect")
        assert client.stdout
        self.assertEqual(client.stdout.readline(), "*** bob joined (1 here)\n")
        server.send_signal(signal.SIGINT)
        client.wait(PATIENCE)
        lost = f"chat.py: the connection to 127.0.0.1:{port} was lost: Server is shutting down\n"
        self.assertEqual(self.finish(client)[::2], (1, lost))

    @unittest.skipUnless(hasattr(signal, "SIGSTOP"), "needs SIGSTOP")
    def test_a_client_that_was_stopped(self) -> None:
        _, port = self.server("--ping-time", "0.2", "--pong-time", "20")
        ann = self.ann(port)
        client = self.client(port)
        ann.until("bob joined")
        client.send_signal(signal.SIGSTOP)
        for number in range(1000):
            ann.send(f"{number} {'x' * 400}\n")
        ann.send("/whois bob\n")
        ann.until("bob is bob")
        client.send_signal(signal.SIGCONT)
        ann.send("the end\n")
        assert client.stdout
        got = [line.split()[1] for line in iter(client.stdout.readline, "ann: the end\n") if line.startswith("ann: ")]
        self.assertEqual(got, [str(number) for number in range(1000)])

    @NEEDS_SIGNALS
    def test_client_interrupted(self) -> None:
        _, port = self.server()
        client = self.client(port)
        assert client.stdout
        client.stdout.readline()
        client.send_signal(signal.SIGINT)
        self.assertEqual(self.finish(client)[::2], (130, ""))

    def test_message_on_the_command_line(self) -> None:
        _, port = self.server()
        ann = self.ann(port)
        got = self.run_client(port, "not read\n", "--name", "ci", "-m", "/one\ntwo", "-m", "three")
        self.assertEqual(got, (0, "", ""))
        self.assertEqual([ann.until("ci: ") for _ in range(3)], ["ci: /one", "ci: two", "ci: three"])

    def test_json(self) -> None:
        _, port = self.server()
        ann = self.ann(port)
        client = self.client(port, "--json")
        assert client.stdout and client.stdin
        items = [json.loads(client.stdout.readline())]
        ann.send("h\x1b\u00ef\n/msg bob psst\n/me waves\n/nick amy\n")
        items += [json.loads(client.stdout.readline()) for _ in range(4)]
        client.stdin.write("from a script\n")
        client.stdin.flush()
        items.append(json.loads(client.stdout.readline()))
        for item in items:
            self.assertRegex(item.pop("id"), r"^[0-9a-f]+$")
            self.assertRegex(item.pop("time"), r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
        said = {"type": "chat", "user": "ann", "channel": "#chat"}
        system = {"type": "system", "user": "ann"}
        wanted = [
            {**system, "event": "join", "text": "*** bob joined (2 here)", "user": "bob", "channel": "#chat"},
            {**said, "text": "h\x1b\u00ef"},
            {"type": "private", "user": "ann", "text": "psst", "to": "bob"},
            {**said, "text": "waves", "action": True},
            {**system, "event": "nick", "text": "*** ann is now amy", "name": "amy"},
            {"type": "ack"},
        ]
        self.assertEqual(items, wanted)
        ann.until("bob: from a script")

    def test_nobody_reads_the_output(self) -> None:
        _, port = self.server()
        ann = self.ann(port)
        client = self.client(port)
        assert client.stdout and client.stderr and client.stdin
        client.stdout.readline()
        client.stdout.close()
        while client.poll() is None:
            ann.send("hello\n")
            time.sleep(0.01)
        self.assertEqual((client.stderr.read(), client.returncode), ("", 1))
        client.stdin.close()
        client.stdin = client.stdout = None


class PipedInput(ProgramCase):
    """What comes through standard input."""

    def test_a_pipe_without_input_or_with_odd_bytes(self) -> None:
        _, port = self.server()
        ann = self.ann(port)
        self.assertEqual(self.run_client(port, "10%\r20%\nnext\0\n", "--name", "ci")[0], 0)
        self.assertEqual([ann.until("ci:") for _ in range(2)], ["ci: 10% 20%", "ci: next "])
        self.assertEqual(self.run_client(port, "", "--name", "ci")[0], 0)
        if os.name == "posix":
            self.assertEqual(self.run_without_input(port).returncode, 0)

    @unittest.skipUnless(os.name == "posix", "needs a shell")
    def test_a_closed_standard_input_at_a_server_with_a_password(self) -> None:
        _, port = self.server(env={**os.environ, "CHAT_PASSWORD": "sesame"})
        told = "wants a password: give it in CHAT_PASSWORD or with --password-file"
        run = self.run_without_input(port)
        self.assertEqual((run.returncode, run.stdout), (1, ""))
        self.assertEqual(run.stderr, f"chat.py: 127.0.0.1:{port} {told}\n")

    def run_without_input(self, port: int) -> subprocess.CompletedProcess[str]:
        """Runs a client whose standard input is closed."""
        command = f'exec "{sys.executable}" "{self.CHAT}" client --port {port} --name nobody <&-'
        return subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=PATIENCE, check=False)

    def test_a_byte_order_mark_is_no_text(self) -> None:
        password = self.make_folder() / "password"
        password.write_text("\ufeffsesame\n", encoding="utf-8")
        _, port = self.server(env={**os.environ, "CHAT_PASSWORD": "sesame"})
        ann = self.peer(port, "ann\nsesame\n", "joined")
        status, _, err = self.run_client(
            port, "\ufeffone\n\ufefftwo\n", "--name", "ci", "--password-file", str(password)
        )
        self.assertEqual((status, err), (0, ""))
        self.assertEqual([ann.until("ci:") for _ in range(2)], ["ci: one", "ci: <U+FEFF>two"])


class Secured(ProgramCase):
    """Programs that ask for a password, or encrypt."""

    def test_a_password_of_our_own_server(self) -> None:
        path = self.make_folder() / "password"
        path.write_text("open sesame\nmore\n", encoding="utf-8")
        _, port = self.server(env={**os.environ, "CHAT_PASSWORD": "open sesame"})
        for secret, args, complaint in (
            ("open sesame", (), ""), ("sesame", ("--password-file", str(path)), ""),
            ("", (), "wants a password: give it in CHAT_PASSWORD or with --password-file"),
            ("sesame", (), "does not accept this password"),
        ):  # fmt: skip
            with self.subTest(secret, args=args):
                client = self.client(port, "-m", "x", *args, env={**os.environ, "CHAT_PASSWORD": secret})
                told = f"chat.py: 127.0.0.1:{port} {complaint}\n" if complaint else ""
                self.assertEqual(self.finish(client)[::2], (1 if complaint else 0, told))

    @staticmethod
    def pin_of(server: subprocess.Popen[str]) -> str:
        """The fingerprint that a server tells as it starts."""
        assert server.stdout
        told = "".join(server.stdout.readline() for _ in range(3))
        return (re.search("--fingerprint ([0-9A-F:]{95})\n", told) or [""])[1]

    @unittest.skipUnless(ssl and shutil.which("openssl"), "needs openssl")
    def test_encrypted(self) -> None:
        folder = self.make_folder()
        made, home = f"{folder}/tls.pem", {**os.environ, "HOME": str(folder)}
        make_certificate(made)
        server, own = self.server("--tls", env=home)
        pin = self.pin_of(server)
        _, port = self.server("--tls-cert", made, "--tls-only")
        lines = "\n".join(f"line {number}" for number in range(300))
        for where, args, trusted, status, complaint in (
            (own, ("--fingerprint", pin), "", 0, ""),
            (own, ("--fingerprint", pin.replace(":", "").lower()), "", 0, ""),
            (own, ("--fingerprint", "00" * 32), "", 1, f"so nothing was sent: its fingerprint is {pin}, not 00:00"),
            (own, ("--tls",), "", 1, "cannot be trusted, so nothing was sent: self"),
            (port, ("--tls",), made, 0, ""), (port, (), "", 1, f"closed the connection: {chat.TLS_ONLY}"),
        ):  # fmt: skip
            with self.subTest(args=args):
                environment = {**os.environ, "SSL_CERT_FILE": trusted} if trusted else None
                found, _, err = self.finish(self.client(where, *args, env=environment), lines)
                self.assertEqual(found, status, err)
                self.assertIn(complaint, err)
                self.assertEqual(err.count("\n"), status)
        again, _ = self.server("--tls", env=home)
        self.assertEqual(self.pin_of(again), pin)
        self.assertEqual(stat.S_IMODE(os.stat(f"{folder}/.chat.py/tls.pem").st_mode), 0o600)

    @unittest.skipUnless(ssl and shutil.which("openssl"), "needs openssl")
    def test_refused_at_the_door(self) -> None:
        made = f"{self.make_folder()}/tls.pem"
        make_certificate(made)
        _, port = self.server("--tls-cert", made, "--max-clients", "1")
        self.ann(port)
        for args in (("--tls",), ()):
            status, _, err = self.run_client(port, "", "--name", "bob", *args)
            self.assertEqual(status, 1)
            self.assertIn(chat.FULL, err)

    def test_no_certificate_to_be_had(self) -> None:
        folder = self.make_folder()
        (folder / "not.pem").write_text("no certificate\n", encoding="ascii")
        for args, complaint in (
            (("--tls",), "--tls needs the openssl program to make a certificate; otherwise give --tls-cert"),
            (("--tls-cert", f"{folder}/not.pem"), f"cannot use {folder}/not.pem for TLS: "),
            (("--tls-cert", f"{folder}/none"), f"cannot use {folder}/none for TLS: "),
            (("--tls-key", f"{folder}/none"), "--tls-key needs --tls-cert"),
        ):
            environment = {**os.environ, "PATH": str(folder), "HOME": str(folder)}
            err = self.complains("server", "--port", "0", *args, env=environment)
            self.assertEqual(err.count("\n"), 1, err)
            self.assertIn(complaint, err)


class AFakeServer(ProgramCase):
    """The client in a pipe, at a server that does what a test wants."""

    def meet(self, *args: str, **more: Any) -> tuple[FakeServer, subprocess.Popen[str]]:
        """A server, and a client that connects to it."""
        fake = FakeServer(self)
        return fake, self.client(fake.port, *args, **more)

    def test_what_a_strange_server_sends_is_shown_or_ignored(self) -> None:
        fake, client = self.meet()
        fake.peer.sock.sendall(
            b":x LINE foo\r\nMESSAGE x\r\n:x ECHO\r\nCLOSED\r\nJOIN\r\n:bob!b@h PRIVMSG\r\nPING\r\n353\r\n\xff\r\n"
            b":s 001 bo\x1b[31mb\r\n:a!b@c PRIVMSG #chat :\x1b]0;x\x07\r\n:s 999 x :y\r\n%s\r\nERROR :bye\r\n"
            % (b"x" * 20000)
        )
        fake.peer.sock.shutdown(socket.SHUT_WR)
        remark = "*** bob is not possible here; you are bo\\x1b[31mb\nchat.py: "
        remark += f"127.0.0.1:{fake.port} closed the connection: bye\n"
        self.assertEqual(self.finish(client), (1, "***  joined\na: \\x1b]0;x\\x07\n", remark))

    def test_refused_line_is_not_called_delivered(self) -> None:
        fake, client = self.meet("-m", "hello")
        fake.welcome()
        fake.until("PRIVMSG")
        fake.send(":s 404 bob #chat :Cannot send to channel")
        fake.until("QUIT")  # else ours would keep the name, and the next try would have another
        told = "chat.py: a line was not delivered: Cannot send to channel\n"
        self.assertEqual(self.finish(client), (1, "", told))

    def test_a_pipe_sends_again_what_was_not_confirmed(self) -> None:
        fake, client = self.meet("-m", "one", "-m", "two", "-m", "three")
        fake.welcome()
        lines = [fake.until("PRIVMSG") for _ in range(3)]
        fake.send(f"{lines[0].partition(' ')[0]} :bob!b@h PRIVMSG #chat :one")
        fake.drop()
        fake.welcome()
        for line in lines[1:]:
            self.assertEqual(fake.until("PRIVMSG"), line)  # with the same id
            fake.send(f"{line.partition(' ')[0]} :bob!b@h PRIVMSG #chat :x")
        fake.until("QUIT")
        fake.drop()
        told = (
            f"*** the connection to 127.0.0.1:{fake.port} was lost: it was closed; trying again, "
            "for 60 s after the end of the input\n*** connected again; what was said meanwhile is not known here\n"
            "*** sent again, so perhaps twice: what this server has not confirmed\n"
        )
        self.assertEqual(self.finish(client), (0, "", told))

    def test_a_pipe_cannot_trust_a_server_that_confirms_nothing(self) -> None:
        fake, client = self.meet("-m", "one")
        fake.welcome("")
        fake.until("PRIVMSG")
        fake.until("PING")
        fake.drop()
        status, _, err = self.finish(client)
        self.assertEqual(status, 1)
        self.assertIn("not known whether all lines were delivered", err)

    def test_a_server_that_does_not_want_us_is_left_alone(self) -> None:
        for why, entered in (
            ("Closing Link: bob (Killed (ann (go away)))", True), ("Closing link: (bob@h) [K-lined: spam]", True),
            ("Closing Link: h (You are not welcome.)", False),
        ):  # fmt: skip
            with self.subTest(why):
                fake, client = self.meet()
                fake.welcome()
                if not entered:
                    fake.send("ERROR :Closing link: (bob@h) [Server shutting down]")  # this is tried again
                    fake.drop()
                    fake.until("USER")
                fake.send(f"ERROR :{why}")
                fake.drop()
                client.wait(PATIENCE)
                status, _, err = self.finish(client)
                *others, last = err.splitlines()
                self.assertEqual(last, f"chat.py: the connection to 127.0.0.1:{fake.port} was lost: {why}")
                self.assertEqual((status, len(others)), (1, 0 if entered else 1))

    def test_a_server_that_lets_us_in_later_is_tried_again(self) -> None:
        fake = FakeServer(self)
        client = self.start("client", "--port", str(fake.port), "--name", "bob", stdin=subprocess.PIPE)
        fake.welcome()
        fake.drop()
        fake.until("USER")
        fake.send("ERROR :Closing Link: h (Trying to reconnect too fast.)")
        fake.drop()
        fake.welcome()
        client.terminate()
        client.communicate(timeout=PATIENCE)

    def test_a_line_that_is_refused_by_a_server_that_confirms_nothing(self) -> None:
        fake = FakeServer(self)
        client = self.start("client", "--port", str(fake.port), "--name", "bob", "-m", "one")
        fake.welcome("")
        token = fake.until("PING").partition(" ")[2]
        fake.send(":s 404 bob #chat :No", f":s PONG s {token}")
        _, err = client.communicate(timeout=PATIENCE)
        self.assertEqual((client.returncode, err), (1, "chat.py: a line was not delivered: No\n"))

    def test_a_server_from_long_ago(self) -> None:
        fake, client = self.meet("-m", "x", "-m", "y")
        fake.until("CAP LS")
        fake.send(":s 421 * CAP :Unknown command", "PING :cookie")
        fake.until("PONG cookie")
        fake.send(":s 001 bob :Welcome")
        fake.until("JOIN")
        fake.send(":bob!b@h JOIN :#chat", ":s 366 bob #chat :End")
        for _ in range(2):
            token = fake.until("PING").partition(" ")[2]
            fake.send(f":s PONG s {token}")
        fake.until("QUIT")
        fake.drop()
        self.assertEqual(self.finish(client), (0, "", ""))

    def test_an_address(self) -> None:
        fake = FakeServer(self)
        client = self.start("client", f"irc://bob@127.0.0.1:{fake.port}/%23caf%C3%A9?sesame", "-m", "x")
        self.assertEqual(fake.until("NICK"), "NICK :bob")
        fake.send(":s CAP * LS :", ":s 001 bob :Welcome")
        self.assertEqual(fake.until("JOIN"), "JOIN #café :sesame")
        fake.send(":s 475 bob #café :Cannot join channel (+k)")
        hint = "its key goes behind it: --channel '#café KEY'"
        told = f"chat.py: cannot join #café: Cannot join channel (+k); {hint}\n"
        self.assertEqual(self.finish(client), (1, "", told))

    def test_parts_of_an_address(self) -> None:
        for url, parts in (
            ("irc://[::1]/#a", {"host": "::1", "port": 6667, "channel": "#a "}),
            ("irc://h/&local?sesame", {"host": "h", "port": 6667, "channel": "&local sesame"}),
            ("irc://h/x?sesame", {"host": "h", "port": 6667, "channel": "x sesame"}),
            ("ircs://h", {"host": "h", "port": 6697, "tls": True}), ("IRC://h:1/", {"host": "h", "port": 1}),
        ):  # fmt: skip
            self.assertEqual(chat.irc_url(url), parts)
        err = self.complains("client", "irc://bob:secret@localhost/chat", status=2)
        self.assertIn("others can read a password here", err)
        self.assertNotIn("secret", err)
        unfit = "its parts cannot contain a space, a comma"
        for url, what in (
            ("http://localhost/", "it is irc://"), ("irc://localhost:99999/", "a whole number from 1 to 65535"),
            ("irc://localhost/chat?key%0D%0APRIVMSG%20%23ops%20%3Apwned", unfit), ("irc://localhost/a%20b", unfit),
        ):  # fmt: skip
            self.assertRaisesRegex(argparse.ArgumentTypeError, what, chat.irc_url, url)
        for part in ("\n", "%0a", "%0D", "%00", "%20", "%2c", "%C2%A0", "%1b"):
            for url in (f"irc://b{part}ob@h/chat?key", f"irc://h/ch{part}at?key", f"irc://bob@h/chat?ke{part}y"):
                with self.subTest(url):
                    self.assertRaises(argparse.ArgumentTypeError, chat.irc_url, url)

    def test_first_contact(self) -> None:
        wants = "if it wants a password, give it in CHAT_PASSWORD or with --password-file"
        for line, text in (
            (":s 464 * :Password incorrect", "wants a password: give it in CHAT_PASSWORD or with --password-file"),
            (":s 465 * :You are ba\x1bnned", "does not let you in: You are ba\\x1bnned"),
            (":s 432 * bob :Erroneous", "the server refuses the name bob: Erroneous; choose another with --name"),
            ("ERROR :Access denied: Bad password?", f"does not let you in: Access denied: Bad password?; {wants}"),
            ("ERROR :This server is full", "closed the connection: This server is full"),
            ("SSH-2.0-OpenSSH_9.2", "closed the connection: at once; is it a chat server?"),
            (":s 473 bob #chat :Invite only", "cannot join #chat: Invite only; choose another with --channel"),
        ):
            with self.subTest(line):
                fake, client = self.meet("-m", "x")
                if "473" in line:
                    fake.send("CAP * LS :", ":s 001 bob :hi")
                fake.until("JOIN" if "473" in line else "USER")
                fake.send(line)
                fake.peer.sock.shutdown(socket.SHUT_WR)
                status, _, err = self.finish(client)
                self.assertEqual(status, 1)
                self.assertRegex(err, rf"^chat\.py: [^\n]*{re.escape(text)}\n$")


class Glass:
    """What a person would see: a terminal as far as the client needs one. Does not break lines anew when resized."""

    CONTROL = re.compile(r"\x1b\[(\??)(\d*)([A-Za-z])|\x1b\[\d+(?:;\d+)*m|\x1b[78]|[\r\n\a\b]|[^\x1b]", re.DOTALL)

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines: list[list[str]] = [[]]  # all that were ever on the screen
        self.row = self.column = 0
        self._saved = 0, 0
        self.bells = 0
        self._tail = ""

    def feed(self, text: str) -> None:
        text = self._tail + text
        at, match = 0, self.CONTROL.match(text)
        while match:
            self.obey(match[0], match[2] or "", match[3] or "")
            at = match.end()
            match = self.CONTROL.match(text, at)
        self._tail = text[at:]
        if len(self._tail) > 20:
            raise AssertionError(f"the terminal was sent {self._tail[:20]!r}")

    def obey(self, text: str, number: str, final: str) -> None:
        line, count, top = self.lines[self.row], int(number or 1), max(len(self.lines) - self.rows, 0)
        if text == "\r":
            self.column = 0
        elif text == "\n":
            self.down()
        elif text == "\a":
            self.bells += 1
        elif text in ("\x1b7", "\x1b8"):
            self._saved = (self.row, self.column) if text == "\x1b7" else self._saved
            self.row, self.column = self._saved
        elif final == "A":
            self.row = max(self.row - count, top)
        elif final == "H":
            self.row, self.column = top, 0
        elif final == "K":
            del line[self.column :]
        elif final == "J":
            start = self.row if number != "2" else top
            del self.lines[max(start, self.row) + 1 :]
            del line[self.column if number != "2" else 0 :]
        elif not text.startswith("\x1b"):
            self.put(text)

    def put(self, char: str) -> None:
        size = chat.char_width(char)
        if not size:
            self.lines[self.row][max(self.column - 1, 0)] += char
            return
        if self.column + size > self.columns:
            self.column = 0
            self.down()
        line = self.lines[self.row]
        line += [" "] * (self.column + size - len(line))
        line[self.column : self.column + size] = [char, *[""] * (size - 1)]
        self.column += size

    def down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append([])

    def text(self) -> str:
        return "\n".join("".join(line).rstrip() for line in self.lines)


class Seat:
    """A client at a pseudo-terminal, and what it shows."""

    def __init__(self, case: ProgramCase, args: list[str], columns: int, shell: str = "exec %s", **more: str) -> None:
        import pty
        import termios

        self.case = case
        self.master, self._slave = pty.openpty()  # both kept open: what was written is not lost, nor are the modes
        self._terminal = termios
        self.resize(columns)
        self.modes_at_first = self.modes()
        self.glass, self.raw = Glass(columns, 24), ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        known = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "CHAT_PASSWORD")}

        # Opened by a session that has none, it becomes the terminal that sends signals.
        tty = os.ttyname(self._slave)
        client = f"'{sys.executable}' '{ProgramCase.CHAT}' \"$@\""
        script = f"exec <{tty} >{tty} 2>&1; {shell % client}"
        env = {**known, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", **more}
        self.program = subprocess.Popen(["sh", "-c", script, "sh", *args], env=env, start_new_session=True)
        case.addCleanup(self.end)

    def resize(self, columns: int) -> None:
        import fcntl

        fcntl.ioctl(self.master, self._terminal.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def modes(self) -> Any:
        """Local modes: whether the terminal echoes, and more."""
        return self._terminal.tcgetattr(self.master)[3]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read(self, seconds: float) -> bool:
        """Takes what is there, or comes; False when there was nothing."""
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        text = self._decoder.decode(os.read(self.master, 1 << 16))
        self.raw += text
        self.glass.feed(text)
        return True

    def until(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            alive = self.program.poll() is None
            if not self.read(0.1) and (not alive or time.monotonic() > end):
                self.case.fail(f"the screen is\n{self.glass.text()}")

    def shows(self, *texts: str) -> None:
        """Waits until all of them are on the screen."""
        self.until(lambda: all(text in self.glass.text() for text in texts))

    def prompts(self, text: str) -> None:
        """Waits until this is the last row."""
        self.until(lambda: self.last() == text)

    def last(self) -> str:
        return self.glass.text().rpartition("\n")[2]

    def wait(self) -> int:
        end = time.monotonic() + PATIENCE
        while self.program.poll() is None and time.monotonic() < end:
            self.read(0.05)
        while self.read(0):
            pass
        return self.program.wait(1)

    def end(self) -> None:
        if self.program.poll() is None:
            self.program.kill()
        self.program.wait(PATIENCE)
        os.close(self.master)
        os.close(self._slave)


class FakeServer:
    """An IRC server that does what a test wants."""

    CAPS = "echo-message message-tags server-time"

    def __init__(self, case: ProgramCase) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE)
        self.port = self._listener.getsockname()[1]
        self._peer: Peer | None = None
        case.addCleanup(self.close)

    @property
    def peer(self) -> Peer:
        if self._peer is None:
            self._peer = Peer(self.port, sock=self._listener.accept()[0])
        return self._peer

    def drop(self) -> None:
        """Ends the connection, if there is one; the next one may come."""
        if self._peer:
            self._peer.close()
        self._peer = None

    def close(self) -> None:
        self.drop()
        self._listener.close()

    def send(self, *lines: str) -> None:
        self.peer.send("".join(f"{line}\r\n" for line in lines))

    def until(self, wanted: str) -> str:
        return self.peer.until(wanted)

    def welcome(self, caps: str = CAPS) -> None:
        """Lets the client in, as bob."""
        self.until("USER")
        self.send(f":s CAP * LS :{caps}")
        if caps:
            self.until("CAP REQ")
            self.send(f":s CAP * ACK :{caps}")
        self.until("CAP END")
        self.send(":s 001 bob :Welcome")
        self.until("JOIN")
        self.send(":bob!b@h JOIN #chat", ":s 353 bob = #chat :bob", ":s 366 bob #chat :End")


@unittest.skipUnless(os.name == "posix", "needs a pseudo-terminal")
class SeatCase(ProgramCase):
    """The client as a person sees it."""

    def sit(self, port: int, *args: str, columns: int = 80, **more: str) -> Seat:
        return Seat(self, ["client", "--port", str(port), "--name", "bob", *args], columns, **more)

    def both(self, **more: Any) -> tuple[Peer, Seat]:
        """ann, who speaks IRC, and bob at a terminal, at a server."""
        _, port = self.server()
        ann = self.irc(port)
        seat = self.sit(port, **more)
        seat.prompts("[#chat 2] bob>")
        ann.sync()
        return ann, seat

    def fake(self, **more: Any) -> tuple[FakeServer, Seat]:
        """bob at a terminal, in #chat at a fake server."""
        fake = FakeServer(self)
        seat = self.sit(fake.port, **more)
        fake.welcome()
        seat.until(lambda: seat.last().startswith("[#chat "))
        return fake, seat

    def irc(self, port: int, name: str = "ann") -> Peer:
        return joined(self, port, f"NICK {name}\nUSER {name} 0 * :x\nJOIN #chat\n", " 366 ")

    def plain(self, port: int, name: str = "ann") -> Peer:
        return joined(self, port, f"{name}\n", f"*** {name} joined")


def joined(case: unittest.TestCase, port: int, data: str, until: str) -> Peer:
    """Somebody who has said this, and was answered that."""
    peer = Peer(port, data)
    case.addCleanup(peer.close)
    peer.until(until)
    return peer


def temporary_folder(case: unittest.TestCase) -> pathlib.Path:
    """One that is there during a test."""
    folder = tempfile.TemporaryDirectory()
    case.addCleanup(folder.cleanup)
    return pathlib.Path(folder.name)


class AtTheTerminal(SeatCase):
    def test_typing_while_500_messages_arrive(self) -> None:
        ann, seat = self.both()
        seat.type("half a 你好 line" + LEFT * 4)
        for number in range(500):
            ann.send(f"PRIVMSG #chat :message {number}\n")
            if number % 50 == 0:
                seat.type(str(number // 50))
        typed = "half a 你好 0123456789line"
        seat.until(lambda: "message 499\n" in seat.glass.text() and seat.last() == f"[#chat 2] bob> {typed}")
        self.assertEqual(seat.glass.column, chat.text_width(f"[#chat 2] bob> {typed}") - len("line"))
        shown = re.findall(r"ann: message (\d+)\n", seat.glass.text())
        self.assertEqual(shown, [str(number) for number in range(500)])
        seat.type("\r")
        self.assertIn(typed, ann.until(" PRIVMSG "))
        seat.until(lambda: f"bob: {typed}\n" in seat.glass.text() and seat.last() == "[#chat 2] bob>")
        self.assertEqual(seat.glass.text().count("half a"), 1)

    def test_a_line_longer_than_the_screen_that_becomes_narrower(self) -> None:
        ann, seat = self.both()
        text = "".join(f"{number:03d} " for number in range(50))
        seat.type(text)
        seat.until(lambda: seat.last().endswith(" 049"))
        shown = len(seat.raw)
        seat.resize(40)
        seat.until(lambda: len(seat.raw) > shown and seat.last().endswith(" 049"))
        self.assertLess(len(seat.last()), 40)
        ann.send("PRIVMSG #chat :between\n")
        seat.shows("ann: between")
        seat.until(lambda: seat.last().startswith("[#chat 2] bob>") and seat.last().endswith(" 049"))
        seat.type("\x01")
        seat.until(lambda: seat.last().startswith("[#chat 2] bob> 000 001"))
        seat.type("\r")
        self.assertIn(text.rstrip(), ann.until(" PRIVMSG "))

    def test_help_completion_and_a_thousand_pasted_lines(self) -> None:
        ann, seat = self.both()
        seat.type("/help\r/help keys\r")
        seat.shows("*** /help keys        shows what the keys do\n")
        seat.shows(*(f"*** {line}\n" for line in chat.KEY_HELP.splitlines()))
        seat.type("a\tlook:\x1b[200~ pasted\x1b[201~\r")
        self.assertIn("ann: look: pasted", ann.until(" PRIVMSG "))
        lines = ["/quit", *(f"line {number}" for number in range(999))]
        paste = "\x1b[200~" + "\r\n".join(lines) + "\x1b[201~"
        seat.type(f"typed{paste}")
        seat.prompts("send 1000 pasted lines? y/n")
        seat.type("n")
        seat.prompts("[#chat 2] bob> typed")
        seat.type(f"{paste}y")
        seat.until(lambda: re.search(r"\n      line 998\n\[#chat 2\] bob> typed$", seat.glass.text()))
        self.assertEqual([ann.until(" PRIVMSG ").rpartition(" :")[2] for _ in lines], lines)
        shown = seat.glass.text()
        self.assertEqual(re.findall(r"(?:\d\d:\d\d bob:|     ) (/quit|line \d+)(?=\n)", shown), lines)
        blocks = -(-len(lines) // chat.MULTILINE_LINES)
        self.assertEqual(len(re.findall(r"\d bob: ", shown)), 1 + blocks)

    def test_a_killed_and_restarted_server(self) -> None:
        port = held_port(self)
        server, _ = self.server("--port", str(port))
        seat = self.sit(port)
        seat.prompts("[#chat 1] bob>")
        seat.type("before\r")
        seat.until(lambda: re.search(r"\d bob: before\n\[#chat 1\] bob>$", seat.glass.text()))
        server.kill()
        server.wait(PATIENCE)
        seat.until(lambda: "[offline, next try in" in seat.last())
        seat.type("one\rtwo\r/nick rob\rthr")
        seat.until(lambda: "bob> thr" in seat.last())
        self.assertIn("\n  ... bob: one\n  ... bob: two\n[", seat.glass.text())
        self.assertIn("Error: not connected; only messages wait until we are", seat.glass.text())
        seat.until(lambda: "next try in 2 s" in seat.last())  # it has tried and waits longer now, on the same row
        self.assertEqual(seat.glass.text().count("was lost"), 1)
        self.server("--port", str(port))
        ann = self.irc(port)
        seat.type("ee\r")
        said = [ann.until(" PRIVMSG ").rpartition("#chat ")[2] for _ in range(3)]
        self.assertEqual(said, [":one", ":two", ":three"])
        seat.until(lambda: "bob: three\n" in seat.glass.text() and seat.last() == "[#chat 2] bob>")
        for text in ("bob: before", "bob: one", "bob: two", "bob: three", "connected again"):
            self.assertEqual(seat.glass.text().count(text), 1, seat.glass.text())

    def test_leaving(self) -> None:
        keys = {"/quit see you\r": 0, "exit\r": 0, "\x04": 0, "\x03": 130, "half\x03": 130, "\x1c": 130}
        for typed, status in keys.items():
            for connected in (True, False) if "/quit" in typed or typed == "\x03" else (True,):
                with self.subTest(typed, connected=connected):
                    self.leave(typed, status, connected)

    def leave(self, keys: str, status: int, connected: bool) -> None:
        server, port = self.server()
        seat = self.sit(port)
        seat.prompts("[#chat 1] bob>")
        self.assertNotEqual(seat.modes(), seat.modes_at_first)
        if not connected:
            server.kill()
            seat.until(lambda: "[offline" in seat.last())
        seat.type(keys)
        self.assertEqual(seat.wait(), status)
        self.assertNotIn("bob>", seat.glass.text())
        self.assertEqual(seat.modes(), seat.modes_at_first)

    def test_rooms(self) -> None:
        ann, seat = self.both()
        seat.type("/join #tea\r")
        seat.prompts("[#tea 1] bob>")
        ann.send("PRIVMSG #chat :come back\nPRIVMSG #chat :please\n")
        seat.prompts("[#tea 1 | #chat +2] bob>")
        self.assertIn(" [#chat] ann: come back\n", seat.glass.text())
        seat.type("/msg #chat soon\r/join #c\t\r")
        seat.prompts("[#chat 2] bob>")
        self.assertTrue(ann.until("PRIVMSG").endswith("PRIVMSG #chat :soon"))
        seat.type("/part #tea\r")
        seat.shows("*** [#tea] bob left\n")
        seat.type("/part\r")
        self.assertIn("PART #chat", ann.until("PART"))
        seat.shows("you are no longer in #chat; /join #chat may bring you back\n")

    def test_a_simple_terminal(self) -> None:
        _, port = self.server()
        ann = self.irc(port)
        seat = self.sit(port, TERM="dumb")
        seat.shows("*** bob joined (2 here)\n", "*** here: ann; /help tells what you can do")
        seat.type("hello\r/dance\r")
        self.assertIn("PRIVMSG #chat :hello", ann.until(" PRIVMSG "))
        seat.shows("/dance is not a command")
        seat.type("half a linx\x7f")
        seat.prompts("[#chat 2] bob> half a lin")
        ann.send("PRIVMSG #chat :\x1b[2Jhi\n")
        seat.until(lambda: re.search(r"\n\d\d:\d\d ann: \\x1b\[2Jhi\n\[#chat 2\] bob> half a lin$", seat.glass.text()))
        seat.type("\x01\x06\x06X\x05\x15")
        self.assertNotIn("\x1b", seat.raw)
        seat.type("/quit\r")
        self.assertEqual(seat.wait(), 0)

    def test_no_colours(self) -> None:
        ann, seat = self.both(NO_COLOR="1")
        for text in ("first", "bob: hi"):  # before the first, a line might count as said before bob came
            ann.send(f"PRIVMSG #chat :{text}\n")
            seat.shows(f"ann: {text}\n")
        self.assertNotRegex(seat.raw, "\x1b\\[[\\d;]*m")
        self.assertEqual(seat.glass.bells, 1)


class SignalsAtTheTerminal(SeatCase):
    def test_many_signals_leave_the_terminal_as_it_was(self) -> None:
        _, port = self.server()
        for _ in range(3):
            seat = self.sit(port)
            seat.prompts("[#chat 1] bob>")
            for number in range(60):
                seat.program.send_signal((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)[number % 4])
                seat.read(0.005)
            self.assertEqual(seat.wait(), 130)
            self.assertEqual(seat.modes(), seat.modes_at_first)
            self.assertNotIn("Traceback", seat.glass.text())

    def test_a_terminal_that_takes_nothing_is_left_as_it_was(self) -> None:
        fake, seat = self.fake()
        fake.peer.sock.settimeout(1)
        with self.assertRaises(OSError):  # the client waits for its terminal, and reads no more
            while True:
                fake.peer.sock.send(b":ann!a@b PRIVMSG #chat :one more line\r\n" * 1000)
        seat.program.send_signal(signal.SIGINT)
        self.assertEqual(seat.program.wait(PATIENCE), 130)
        self.assertEqual(seat.modes(), seat.modes_at_first)

    def test_a_terminal_that_is_closed_ends_the_client(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            _, port = self.server()
            seat = self.sit(port, shell=f"exec %s 2>'{folder}/err'")
            seat.until(lambda: seat.last() == "[#chat 1] bob>")
            os.close(seat.master)
            os.close(seat._slave)
            self.assertIn(seat.program.wait(PATIENCE), (0, 1, 130))
            self.assertNotIn("Traceback", pathlib.Path(folder, "err").read_text(encoding="utf-8"))
        seat.master, seat._slave = os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_RDONLY)

    @unittest.skipIf(platform.python_implementation() == "PyPy", "it takes SIGINT itself, also where that is ignored")
    def test_an_ignored_signal_stays_so(self) -> None:
        _, port = self.server()
        seat = self.sit(port, shell="trap '' INT; exec %s")
        seat.until(lambda: seat.last() == "[#chat 1] bob>")
        seat.program.send_signal(signal.SIGINT)
        seat.type("still here")
        seat.until(lambda: seat.last() == "[#chat 1] bob> still here")

    def test_not_suspended_without_a_shell(self) -> None:
        _, seat = self.both()
        seat.type("typed")
        seat.prompts("[#chat 2] bob> typed")
        seat.type("\x1a")  # nobody is there who could let it go on
        seat.type("!")
        seat.prompts("[#chat 2] bob> typed!")

    def test_suspended(self) -> None:
        ann, seat = self.both(shell="set -m; %s; echo stopped; read x; fg >/dev/null")
        seat.type("typed")
        seat.prompts("[#chat 2] bob> typed")
        seat.type("\x1a")
        seat.shows("stopped\n")
        self.assertEqual(seat.modes(), seat.modes_at_first)
        self.assertNotIn("bob>", seat.glass.text())
        ann.send("PRIVMSG #chat :meanwhile\n")
        seat.type("\r")
        seat.until(lambda: "ann: meanwhile\n" in seat.glass.text() and seat.last() == "[#chat 2] bob> typed")


class AtTheTerminalOfAFake(SeatCase):
    HOSTILE = (
        "\x1b[31mred", "\x1b]0;title\x07", "\x1b]52;c;Y2xpcA==\x07", "\x1b[2J\x1b[H", "\x1bc", "\x9b31m", "\x9d0;t\x9c",
        "\x7f\x08\x08", "\u202egnp.exe", "\u2066x\u2069", "a\u200bb\u200d\ufeff", "x" + "\u0301" * 40, "\U000e0041",
        "\u2028", "\x1bP+q\x1b\\", "\x1b[6n", "\x1b[200~evil\x1b[201~", "\u115f\u3164\u034f",
    )  # fmt: skip

    PLACES = (
        ":ann!a@b PRIVMSG #chat :TEXT", ":ann!a@b PRIVMSG bob :TEXT", ":ann!a@b PRIVMSG #chat :\x01ACTION TEXT\x01",
        ":TEXT!a@b PRIVMSG #chat :hi", ":TEXT!a@b JOIN #chat", ":TEXT!a@b NICK TEXT", ":ann!a@b TOPIC #chat :TEXT",
        ":ann!a@b QUIT :TEXT", ":ann!a@b PART #chat :TEXT", ":s 404 bob #chat :TEXT", ":s 353 bob = #chat :TEXT",
        ":s 332 bob TEXT :TEXT", ":s NOTICE * :TEXT", f"@{chat.COUNT_TAG}=TEXT :cat!a@b JOIN #chat",
    )  # fmt: skip
    SHOWN = (
        "\\x1b[31mred", "\\x9b31m", "<U+202E>gnp.exe", "a<U+200B>b<U+200D><U+FEFF>", "<U+0301>", "<U+115F>",
    )  # fmt: skip

    def test_nothing_that_arrives_is_obeyed(self) -> None:
        fake, seat = self.fake(NO_COLOR="1")
        for number, text in enumerate(self.HOSTILE):
            for place in self.PLACES:
                fake.send(place.replace("TEXT", text))
            fake.send(f":ann!a@b PRIVMSG #chat :end {number}")
        seat.shows(f"ann: end {len(self.HOSTILE) - 1}\n")
        seat.type("a\t\t\x15/who\r")
        fake.until("WHO #chat")
        raw = re.sub(r"\x1b[78]|\x1b\[(?:\d*A|[JK]|\?2004[hl])", "", seat.raw)  # what the client itself may say
        unsafe = {char for char in raw if unicodedata.category(char) in (*chat.UNSAFE_CATEGORIES, "Mn")}
        self.assertLessEqual(unsafe, set("\r\n\a\u0301"))
        self.assertNotIn("\u0301" * 9, raw)
        for shown in self.SHOWN:
            self.assertIn(shown, seat.glass.text().replace("\n", ""))

    def test_own_lines_are_dim_until_they_are_echoed(self) -> None:
        fake, seat = self.fake()
        seat.type("one\rtwo\r")
        seat.shows("\n  ... bob: one\n  ... bob: two\n[#chat")
        self.assertIn("\x1b[2m  ... bob: one\x1b[0m", seat.raw)
        tags = [fake.until("PRIVMSG").partition(" ")[0] for _ in range(2)]
        fake.send(f"{tags[0]} :bob!b@h PRIVMSG #chat :one")
        seat.until(lambda: re.search(r"\d\d:\d\d bob: one\n  \.\.\. bob: two\n\[#chat", seat.glass.text()))
        fake.send(f"{tags[1]} :bob!b@h PRIVMSG #chat :two")
        seat.until(lambda: re.search(r"\d\d:\d\d bob: one\n\d\d:\d\d bob: two\n\[#chat", seat.glass.text()))

    def test_a_password_is_asked_for(self) -> None:
        fake = FakeServer(self)
        seat = self.sit(fake.port)
        fake.until("USER")
        fake.send(":s 464 * :Password incorrect")
        seat.shows(f"password for 127.0.0.1:{fake.port}:")
        fake.drop()
        for tries, word in enumerate(("sesam", "Sesame"), 2):  # asked for again, twice
            seat.type(f"{word}\r")
            self.assertEqual(fake.until("PASS"), f"PASS {word}")
            fake.send(":s 464 * :Password incorrect")
            seat.until(lambda: seat.glass.text().count("password for 127") == tries)  # noqa: B023
            self.assertIn("does not accept this password", seat.glass.text())
            fake.drop()
        seat.type("sesame\r")
        self.assertEqual(fake.until("PASS"), "PASS sesame")
        fake.welcome()
        seat.until(lambda: seat.last().startswith("[#chat "))
        self.assertNotIn("sesame", seat.glass.text())


class ReadmeOutput(SeatCase):
    """What the README shows is what the programs print."""

    def block(self, start: str) -> list[str]:
        """The lines of the README's block of code that begins with `start`."""
        lines = README.splitlines()
        at = lines.index(f"    {start}")
        return [line[4:] for line in itertools.takewhile(lambda line: line.startswith("    "), lines[at:])]

    def test_what_a_newcomer_does_first(self) -> None:
        program, port = self.server()
        assert program.stdout
        server = self.block("$ python3 chat.py server")[2:]  # the command; a line that self.server has read
        printed = [program.stdout.readline().rstrip("\n").replace(str(port), "9090") for _ in server]
        printed = [line.replace(f"{chat.PYTHON} ", "python3 ") for line in printed]
        self.assertEqual(printed, server)
        seat = self.sit(port)
        client = self.block("$ python3 chat.py client --name bob")[1:]
        seat.prompts(client[-1])
        self.assertEqual(re.sub(r"^\d\d:\d\d", "21:16", seat.glass.text(), flags=re.MULTILINE), "\n".join(client))
        self.talk(self.block("$ nc 127.0.0.1 9090")[1:], port, seat)

    def talk(self, lines: list[str], port: int, seat: Seat) -> None:
        """Plays a conversation at nc: what bob does there he types at his seat."""
        ann = Peer(port)
        self.addCleanup(ann.close)
        prompt, _, name = lines.pop(0).rpartition(" ")
        self.assertEqual(ann.sock.recv(99).decode(), f"{prompt} ")
        ann.send(f"{name}\n")
        for line in lines:
            bobs = re.fullmatch(r"bob: (.*)|\* bob (.*)", line)
            if bobs:
                seat.type(f"{bobs[1] or f'/me {bobs[2]}'}\r")
            if bobs or line.startswith("*** "):
                self.assertEqual(ann.line(), line)
            else:
                ann.send(f"{line}\n")

    def test_what_a_script_sends_and_gets(self) -> None:
        bot = Peer(self.server()[1])
        self.addCleanup(bot.close)
        for line in self.block('> {"type": "join", "user": "bot"}'):
            if line.startswith("> "):
                bot.send(f"{line[2:]}\n")
            else:
                found, shown = json.loads(bot.line() or ""), json.loads(line[2:])
                self.assertEqual({**found, "id": 0, "time": 0}, {**shown, "id": 0, "time": 0})


class Operator(SeatCase):
    """Whoever runs a server, at its terminal."""

    def serve(self, *args: str, shell: str = "exec %s", until: str = "server>") -> tuple[Seat, int]:
        seat = Seat(self, ["server", "--port", "0", *args], 100, shell)
        seat.shows(until)
        return seat, self.number(seat, r"listening on 127\.0\.0\.1:(\d+)")

    @staticmethod
    def number(seat: Seat, pattern: str) -> int:
        return int((re.search(pattern, seat.glass.text()) or ["", "0"])[1])

    def enter(self, seat: Seat, line: str, answer: str) -> None:
        """Types a line, and waits for what follows it."""
        seat.type(f"{line}\r")
        pattern = f"server> {re.escape(line)}\n(.*\n)*?.*{answer}"
        seat.until(lambda: re.search(pattern, seat.glass.text()))

    def test_what_an_operator_can_do(self) -> None:
        seat, port = self.serve()
        self.enter(seat, "/who", "nobody is here\n")
        ann, bob, eve = self.plain(port, "ann"), self.irc(port, "bob"), self.plain(port, "eve")
        seat.shows("INFO eve from 127.0.0.1 joined\nserver>")
        bob.send("PRIVMSG #chat :one\r\n")
        ann.until("bob: one")
        self.enter(seat, "/who", r"ann from 127\.0\.0\.1, Plain, silent for 0 s: #chat\n")
        stats = r"3 people in 1 channel, 3 connections\n1 message, \d+ deliveries\n(\d+|\?) MB, up for \d+ s\n"
        self.enter(seat, "/stats", stats)
        self.enter(seat, "/say closing at six", "told 3 people\n")
        ann.until("*** From the operator: closing at six")
        self.assertEqual(bob.until("operator"), ":chat.local NOTICE * :From the operator: closing at six")
        seat.type("half a line")
        bob.send("NICK rob\r\n")
        ann.until("bob is now rob")
        carl = self.plain(port, "carl")
        seat.until(lambda: re.search(r"INFO carl from 127\.0\.0\.1 joined\nserver> half a line$", seat.glass.text()))
        seat.type("\x15/ki\tro\t too loud\r")
        thrown = "Thrown out: too loud"
        self.assertEqual(ann.until("rob left"), f"*** rob left ({thrown})")
        self.assertEqual(bob.rest()[-2:], [f":chat.local KILL rob :{thrown}", f"{ERROR}{thrown}"])
        self.enter(seat, "/kick nobody", "Error: nobody here is called nobody\n")
        self.enter(seat, "/help", r"/ban \[NAME or ADDRESS\] +shuts an address out")
        self.enter(seat, "/ban eve", "eve is banned, until the server ends; the same again lets them back\n")
        self.assertEqual(eve.rest()[-1], "*** Thrown out: banned")
        banned = Peer(port, "EVE\n")
        self.addCleanup(banned.close)
        self.assertEqual(banned.rest()[-1], "*** You are banned from this server")
        self.enter(seat, "/ban 2001:db8::1", "2001:db8::1 is banned")
        self.enter(seat, "/ban 10.0.0.0/8", "Error: 10.0.0.0/8 is neither the name of somebody here nor an address\n")
        self.enter(seat, "/ban typo", "Error: typo is neither the name of somebody here nor an address\n")
        self.enter(seat, "/ban", "banned: eve, 2001:db8::1\n")
        self.enter(seat, "/ban eve", "eve may come back\n")
        for peer in (ann, self.plain(port, "eve")):
            peer.close()
        seat.type("/stop\r")
        self.assertEqual(carl.rest()[-1], "*** Server is shutting down")
        self.assertEqual((seat.wait(), seat.modes()), (0, seat.modes_at_first))

    def test_who_may_moderate(self) -> None:
        seat, port = self.serve()
        self.plain(port, "ann")
        carl = self.plain(port, "carl")
        self.enter(seat, "/op nobody", "Error: nobody is not here\n")
        self.enter(seat, "/op carl", "carl may moderate #chat\n")
        self.assertEqual(carl.until("set +o"), "*** chat.local set +o carl")

    def test_who_is_thrown_out_does_not_come_back_by_itself(self) -> None:
        seat, port = self.serve()
        ann = self.plain(port, "ann")
        dan = self.start("client", "--port", str(port), "--name", "dan", stdin=subprocess.PIPE)
        ann.until("dan joined")
        self.enter(seat, "/kick dan", "")
        _, err = dan.communicate(timeout=PATIENCE)
        ending = f"chat.py: 127.0.0.1:{port} has ended the connection: Thrown out: by the operator\n"
        self.assertEqual((dan.returncode, err), (1, ending))

    def test_interrupted(self) -> None:
        seat, port = self.serve("--log", os.devnull)
        ann = self.plain(port, "ann")
        self.enter(seat, "/stats", "1 person in 1 channel, 1 connection")
        self.assertNotIn("INFO", seat.glass.text())
        seat.type("\x03")
        self.assertEqual(ann.rest()[-1], "*** Server is shutting down")
        self.assertEqual((seat.wait(), seat.modes()), (0, seat.modes_at_first))

    def test_suspended_and_let_go_on(self) -> None:
        seat, port = self.serve(shell="set -m; %s; echo stopped; bg; read x; fg >/dev/null")
        seat.type("\x1a")
        seat.shows("stopped\n")
        self.plain(port).close()  # served in the background
        seat.type("\r")
        seat.prompts("server>")
        self.enter(seat, "/who", "nobody is here\n")
        seat.type("/stop\r")
        self.assertEqual(seat.wait(), 0)

    def test_a_terminal_that_takes_nothing(self) -> None:
        seat, port = self.serve("-v")
        for number in range(400):  # fills what lies between
            peer = Peer(port, f"u{number}\nexit\n")
            peer.rest()
            peer.close()
        seat.program.terminate()
        self.assertEqual(seat.program.wait(PATIENCE), 0)

    def test_a_terminal_that_hangs_up(self) -> None:
        seat, port = self.serve()
        ann = self.plain(port, "ann")
        os.close(seat.master)
        os.close(seat._slave)
        self.assertEqual(ann.rest()[-1], "*** Server is shutting down")
        self.assertEqual(seat.program.wait(PATIENCE), 0)
        seat.master, seat._slave = os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_RDONLY)

    def test_in_the_background(self) -> None:
        seat, port = self.serve(shell="set -m; %s & echo process $!; wait $!", until="any IRC client")
        process = self.number(seat, r"process (\d+)")
        self.addCleanup(lambda: None if seat.program.poll() is not None else os.kill(process, signal.SIGKILL))
        self.plain(port).close()
        seat.shows("ann from 127.0.0.1 joined")
        self.assertNotIn("server>", seat.glass.text())
        self.assertEqual(seat.modes(), seat.modes_at_first)
        os.kill(process, signal.SIGHUP)  # of use to one that writes a log file
        self.plain(port, "bob").close()
        os.kill(process, signal.SIGTERM)
        self.assertEqual(seat.wait(), 0)

    def test_brought_to_the_foreground(self) -> None:
        seat, port = self.serve(shell="set -m; %s & echo process $!; read x; fg >/dev/null", until="any IRC client")
        process = self.number(seat, r"process (\d+)")
        self.addCleanup(lambda: None if seat.program.poll() is not None else os.kill(process, signal.SIGKILL))
        self.plain(port).close()
        seat.shows("ann from 127.0.0.1 joined")
        seat.type("\r")
        seat.prompts("server>")
        seat.type("half a line")
        seat.prompts("server> half a line")
        seat.type("\x03")  # which only drops it
        seat.prompts("server>")
        self.enter(seat, "/who", "nobody is here\n")
        seat.type("\x03")
        self.assertEqual((seat.wait(), seat.modes()), (0, seat.modes_at_first))


class OperatorsCommands(ServerCase):
    """What the operator types, without a terminal."""

    def setUp(self) -> None:
        super().setUp()
        self.commands = chat.OperatorCommands(self.server)

    def test_with_and_without_a_slash_in_either_case(self) -> None:
        for line in ("/who", "who", " WHO ", "/Who "):
            self.assertEqual(self.commands.run(line), ["nobody is here"], line)

    def test_wrong_grammar(self) -> None:
        wrong = {"say": "/say TEXT", "/kick  ": "/kick NAME [REASON]", "stop shouting": "/stop", "who is it?": "/who"}
        with mock.patch.object(self.server, "stop") as stop:
            for line, grammar in wrong.items():
                self.assertEqual(self.commands.run(line), [f"Error: it is {grammar}"], line)
        stop.assert_not_called()

    def test_help(self) -> None:
        shown = self.commands.run("/help")
        self.assertEqual([line.split()[0] for line in shown], sorted(f"/{name}" for name in self.commands.help))
        kick = "/kick NAME [REASON]     throws somebody out"
        for line in ("help kick", "/help /KICK"):
            self.assertEqual(self.commands.run(line), [kick])
        self.assertIn(kick, shown)

    def test_only_a_name_of_a_command_is_one(self) -> None:
        self.commands.run("/stats")
        for line in ("", " ", "/who"):  # none of them repeats another
            self.assertEqual(self.commands.run(line), ["nobody is here"] if line == "/who" else [])
        for line in ("?", "? who", "?who", "!who", "! who", "EOF", "/", "//who", "help ?", "shell", "/kickeve", "exit"):
            self.assertIn("/help lists them", *self.commands.run(line))

    def test_whatever_is_typed_nothing_is_raised(self) -> None:
        rng = random.Random(4)
        self.plain("eve")
        words = [*self.commands.help, *dir(cmd.Cmd), "eve", "::1", "1.2.3.4", "fe80::1%x"]
        words += [*"/?!.\0\t\x1b\u2028\U0001f600 [{%"]
        with mock.patch.object(self.server, "stop"):
            for _ in range(2000):
                line = rng.choice(["", "/"]) + rng.choice(["", " "]).join(rng.choices(words, k=rng.randint(0, 4)))
                try:
                    self.assertTrue(all("\n" not in answer for answer in self.commands.run(line)))
                except Exception as error:
                    self.fail(f"{line!r}: {error!r}")

    def test_commands_and_names_are_completed(self) -> None:
        self.plain("eve")
        self.plain("Eva")
        console = chat.OperatorConsole(self.server)
        self.addCleanup(console.wakeup.close)
        complete = console._complete
        names = ["eve", "Eva"]
        cases = {"/s": (0, ["/say ", "/stats ", "/stop "]), "k": (0, ["/kick "]), "x": (0, [])}
        for head, found in {**cases, "/kick ev": (6, names), "say x e": (6, names)}.items():
            self.assertEqual(complete(head), found, head)

    def test_an_address_is_shut_out(self) -> None:
        with mock.patch.object(chat, "shown_host", lambda key, secret: "10.0.0.1"):
            ann, bob = self.plain("ann"), self.irc("bob")
            banned = "bob (127.0.0.1) is banned, until the server ends; the same again lets them back"
            self.assertEqual(self.commands.run("/ban bob"), [banned])
            for peer in (ann, bob):
                self.assertIn("Thrown out: banned", peer.rest()[-1])
            with self.logs(logging.WARNING):
                self.assertEqual(self.peer("eve\n").rest(), ["ERROR :You are banned from this server"])
            self.commands.run("/ban 127.0.0.1")
            self.plain("eve")

    def test_lengths(self) -> None:
        for seconds, text in ((0.4, "0 s"), (59, "59 s"), (60, "1 min"), (7500, "2 h 5 min"), (100_000, "1 d 3 h")):
            self.assertEqual(chat.format_duration(seconds), text)


@unittest.skipUnless(shutil.which("tmux"), "needs tmux")
class InTmux(ProgramCase):
    """A real terminal, which breaks lines anew when it is resized."""

    def tmux(self, *args: str) -> str:
        command = ["tmux", "-f", os.devnull, "-S", self.socket, *args]
        return subprocess.run(command, stdout=subprocess.PIPE, timeout=PATIENCE, check=True).stdout.decode()

    def screen(self) -> str:
        return self.tmux("capture-pane", "-p", "-S", "-", "-t", "chat").rstrip("\n")

    def until(self, pattern: str) -> str:
        end = time.monotonic() + PATIENCE
        while True:
            screen = self.screen()
            if re.search(pattern, screen):
                return screen
            self.assertLess(time.monotonic(), end, f"{pattern} is not in\n{screen}")
            time.sleep(0.02)

    def both(self, columns: int) -> Peer:
        """bob in such a terminal, and ann."""
        _, port = self.server()
        ann = joined(self, port, "ann\n", "joined")
        self.socket = str(temporary_folder(self) / "s")
        program = f"'{sys.executable}' '{HERE / 'chat.py'}' client --port {port} --name bob"
        self.tmux("new-session", "-d", "-s", "chat", "-x", str(columns), "-y", "20", f"TERM=screen {program}")
        self.addCleanup(subprocess.run, ["tmux", "-S", self.socket, "kill-server"], check=True)
        self.until(r"\[#chat 2\] bob>$")
        return ann

    def test_no_text_passes_for_a_line_of_its_own(self) -> None:
        for columns in (24, 37, 80):
            with self.subTest(columns):
                ann = self.both(columns)
                for size in range(columns + 9):
                    ann.send(f"{' .x你'[size % 4] * size}99:59 *** bob joined (3 here)\n")
                ann.send("the end\n")
                screen = self.until(r"ann: the\s+end\n")
                for row in screen.split("\n"):
                    self.assertRegex(row, r"^([0-2]\d:\d\d( ann:| \*\*\*|$)|      |\[#chat|$)")

    def test_resizing_and_typing(self) -> None:
        ann = self.both(60)
        typed = "a line of 你好 that is nearly as long as it can"
        self.tmux("send-keys", "-t", "chat", "-l", typed)
        self.until("it can$")
        for number, size in enumerate((35, 60, 20, 90, 25, 80)):
            self.tmux("resize-window", "-t", "chat", "-x", str(size), "-y", "20")
            row = "".join(chat.viewport(["[#chat 2] bob> ", "[#chat 2] ", "> "], typed, len(typed), size - 1))
            self.until(re.escape(row) + "$")
            ann.send(f"number {number}\n")
            self.until(f"number {number}\n{re.escape(row)}$")
        screen = self.until(r"\n\[#chat 2\] bob> a line of 你好 that is nearly as long as it can$")
        self.assertEqual(screen.count("bob> "), 1, screen)
        self.assertEqual(screen.count("nearly"), 1, screen)
        self.assertEqual(re.findall(r"number (\d)", screen), list("012345"), screen)
        self.tmux("send-keys", "-t", "chat", "Enter")
        ann.until(f"bob: {typed}")
        self.until(r"bob: a line .*\n\[#chat 2\] bob>$")


INSPIRCD = """<config format="xml">
<server name="irc.test" description="test" network="Test" id="001">
<admin name="a" nick="a" email="a@b.c">
<bind address="127.0.0.1" port="{port}" type="clients">
<connect allow="*" password="sesame" timeout="60" threshold="10" recvq="8192" localmax="100" globalmax="100"
 resolvehostnames="no">
<channels users="20" opers="60">
<dns server="127.0.0.1" timeout="1">
<pid file="{folder}/pid">
<log method="file" type="*" level="none" target="{folder}/log">
<module name="cap"><module name="ircv3_echomessage"><module name="ircv3_ctctags"><module name="ircv3_servertime">
<module name="conn_join"><autojoin channel="#lobby">
"""  # with the flood limits that Debian installs


class Browser:
    """Chromium without a window, by chromedriver: the WebDriver protocol (W3C)."""

    ARGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")

    def __init__(self, folder: pathlib.Path) -> None:
        command = ["chromedriver", "--port=0"]
        self.driver = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
        assert self.driver.stdout
        found = next(filter(None, (re.search(r"successfully on port (\d+)", line) for line in self.driver.stdout)))
        self.other = f"http://127.0.0.1:{found[1]}/status"  # a page of another origin
        self.root = f"http://127.0.0.1:{found[1]}/session"
        options = {"args": [*self.ARGS, f"--user-data-dir={folder}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.root += f"/{self.ask('POST', '', capabilities={'alwaysMatch': wanted})['sessionId']}"
        self.tab = self.first = self.ask("GET", "/window")

    def ask(self, method: str, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def devtools(self, command: str, **params: Any) -> Any:
        return self.ask("POST", "/goog/cdp/execute", cmd=command, params=params)

    def close(self) -> None:
        try:
            self.ask("DELETE", "")
        finally:
            os.killpg(self.driver.pid, signal.SIGKILL)  # with what is left of Chromium
            self.driver.communicate(timeout=PATIENCE)


class Page:
    """The page of one person, in a tab of its own. Each has an origin, and so a memory, of its own."""

    def __init__(self, browser: Browser, port: int, name: str, at: str = "") -> None:
        self.browser = browser
        self.address = f"http://{name or 'nobody'}.localhost:{port}/{at}"
        self.tab = browser.ask("POST", "/window/new", type="tab")["handle"]
        self.ask("POST", "/url", url=self.address)
        if name:
            self.type(f"{name}\n", "#name")
            self.until(f"{name} joined")

    def ask(self, method: str, path: str, **body: Any) -> Any:
        """Asks the browser for something, in this tab."""
        if self.browser.tab != self.tab:
            self.browser.ask("POST", "/window", handle=self.tab)
            self.browser.tab = self.tab
        return self.browser.ask(method, path, **body)

    def run(self, script: str, *args: Any) -> Any:
        return self.ask("POST", "/execute/sync", script=script, args=args)

    def type(self, text: str, where: str = "#draft") -> None:
        found = self.ask("POST", "/element", using="css selector", value=where)
        path = f"/element/{next(iter(found.values()))}/value"
        self.ask("POST", path, text=text.replace("\n", "\ue007"))

    def press(self, where: str) -> None:
        found = self.ask("POST", "/element", using="css selector", value=where)
        self.ask("POST", f"/element/{next(iter(found.values()))}/click")

    def wait(self, condition: str, *args: Any) -> Any:
        """Waits until a condition holds in the page; returns its value."""
        end = time.monotonic() + PATIENCE
        while True:
            found = self.run(f"return {condition}", *args)
            if found:
                return found
            assert time.monotonic() < end, (condition, args, self.run("return document.body.innerText"))
            time.sleep(0.02)

    def until(self, text: str) -> None:
        """Waits until a line contains a text."""
        self.wait("log.innerText.includes(arguments[0])", text)

    def lines(self, look: str = "") -> list[str]:
        """The texts of the lines, in order."""
        script = "return [...document.querySelectorAll(arguments[0])].map((text) => text.innerText)"
        return list(self.run(script, f"#log .line{look} .text"))

    def count(self, text: str) -> int:
        return sum(text in line for line in self.lines())

    def close(self) -> None:
        self.ask("DELETE", "/window")
        self.browser.tab = self.browser.first
        self.browser.ask("POST", "/window", handle=self.browser.first)

    def picture(self, name: str) -> None:
        """Takes a picture, if somebody wants to look at them."""
        if os.environ.get("CHAT_TEST_PICTURES"):
            path = pathlib.Path(os.environ["CHAT_TEST_PICTURES"]) / f"{name}.png"
            path.write_bytes(binascii.a2b_base64(self.ask("GET", "/screenshot")))

    def look(self, width: int, dark: bool = False) -> None:
        """Makes the page so wide, in these colours."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.run("")
        size = {"width": width, "height": 720, "deviceScaleFactor": 1, "mobile": False}
        self.browser.devtools("Emulation.setDeviceMetricsOverride", **size)
        self.browser.devtools("Emulation.setEmulatedMedia", features=[scheme])


# The least contrast of a text with what is behind it, of all texts that are seen.
CONTRAST = """
    const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    function luminance(color) {
      context.fillStyle = color;
      context.fillRect(0, 0, 1, 1);
      const [red, green, blue] = [...context.getImageData(0, 0, 1, 1).data].map((value) =>
        value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
      return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    }
    function ground(node) {
      const color = getComputedStyle(node).backgroundColor;
      return color !== "rgba(0, 0, 0, 0)" || !node.parentElement ? color : ground(node.parentElement);
    }
    function contrast(node, pseudo) {
      const pair = [luminance(getComputedStyle(node, pseudo).color), luminance(ground(node))].sort();
      return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    }
    const found = [[contrast(draft, "::placeholder"), "placeholder"]];
    for (const node of document.querySelectorAll("#room *")) {
      if (!node.checkVisibility()) continue;
      if ([...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
        found.push([contrast(node), node.className + node.id + node.tagName + node.textContent]);
      if (getComputedStyle(node, "::before").content !== "none")
        found.push([contrast(node, "::before"), "before " + node.className]);
    }
    return [found.length, ...found.sort((one, other) => one[0] - other[0])[0]];
"""


@unittest.skipUnless(shutil.which("chromium") and shutil.which("chromedriver"), "needs Chromium")
class BrowserCase(ProgramCase):
    """The page as people have it. Plays share a test, as a browser takes seconds to start."""

    DAY = 86400 * 10**6

    def play(self, *plays: Callable[[], None]) -> None:
        """Runs plays; then nothing may have been complained about on the console."""
        self.folder = temporary_folder(self)
        self.history = str(self.folder / "history")
        self.fill_history()
        self.port = held_port(self)
        self.begin()
        self.browser = Browser(self.folder / "profile")
        self.addCleanup(self.browser.close)
        for play in plays:
            with self.subTest(play.__name__):
                play()
        page = self.page("last")
        page.run("try { log.innerHTML = 'x' } catch {}")  # which is not allowed: so we see that complaints are seen
        strange = [line["message"] for line in self.browser.ask("POST", "/se/log", type="browser")]
        expected = "WebSocket connection to .* failed|/favicon.ico - "  # without a network; of a foreign page
        strange = [line for line in strange if not re.search(expected, line)]
        self.assertRegex("\n".join(strange), "^.*This document requires 'TrustedHTML' assignment.*$")

    def begin(self) -> None:
        """Starts the server, perhaps again."""
        self.program, _ = self.server("--history", self.history, "--port", str(self.port))

    def fill_history(self) -> None:
        """Lines of the last days."""
        history = chat.SqliteHistory(self.history)
        now = int(time.time() * 1e6)
        for number in range(130):
            text = f"line {number} of the day before" if number else "what was said first"
            history.append([("#chat", HistoryCase.said(now - 2 * self.DAY + number * 10**6, text))])
        history.append([("#chat", HistoryCase.said(now - self.DAY, "said yesterday"))])
        history.close()

    def page(self, name: str, at: str = "") -> Page:
        return Page(self.browser, self.port, name, at)

    def person(self, name: str) -> Peer:
        return self.peer(self.port, f"{name}\n", "joined")


class InTheBrowser(BrowserCase):
    def test_the_page(self) -> None:
        plays = self.everybody_talks, self.kinds_of_lines, self.names_and_topic
        self.play(*plays, self.keyboard, self.pasted_lines, self.scrolling)

    def everybody_talks(self) -> None:
        """Two pages, nc, an IRC client and the bundled client in one room."""
        ann, bob = self.page("ann"), self.page("bob")
        ann.until("bob joined")
        nick = self.person("nick")
        ida = self.peer(self.port, "NICK ida\r\nUSER i 0 * :i\r\nJOIN #chat\r\n", " 366 ")
        dan = self.client(self.port, "--name", "dan")
        ann.until("dan joined")
        ann.type("from ann\n")
        for peer in (nick, ida):
            peer.until("from ann")
        ida.send("PRIVMSG #chat :from ida\r\n")
        nick.send("from nick\n")
        out, _ = dan.communicate("from dan\n", timeout=PATIENCE)
        self.assertIn("ann: from ann", out)
        bob.type("from bob\n")
        for page in (ann, bob):
            for name in ("ann", "ida", "nick", "dan", "bob"):
                page.until(f"from {name}")
            page.wait("!document.querySelector('.pending')")
        self.assertEqual(ann.lines(".chat"), bob.lines(".chat"))
        ann.close()
        bob.close()

    def kinds_of_lines(self) -> None:
        """Each looks like what it is, and markup is text."""
        eva, bob = self.page("eva"), self.person("bert")
        eva.type("/topic Release on Friday\nhi all, I am back\n")
        bob.until("hi all")
        bob.send("hello eva, look at (https://example.org/a_(b)?c=1), or https://example.org/d.\nand one line more\n")
        bob.send(
            "<img src=x onerror=alert(1)><b>bold</b> &amp; javascript:alert(1)\nevil \u202etxt.exe\u2066 \x1b[31m\n"
        )
        bob.send("/me waves at everybody\n/msg eva psst, only for you\nthe end\n" + "long " * 80 + "\n")
        eva.until("the end")
        bob.send("a slip\n")
        eva.until("a slip")
        bob.send("/redact * sorry\n")
        eva.wait("document.querySelector('.removed')?.innerText === 'bert removed a message: sorry'")
        self.assertEqual(eva.count("a slip"), 0)
        eva.type("/reply psst back\n/me nods\n/msg nobody there?\n")
        bob.until("eva nods")
        self.assertEqual(bob.seen[-2], "[private] eva: psst back")
        eva.until("Not sent: there? (nobody here is called nobody)")
        eva.type(f"/msg {'x' * 450} hi\n")
        eva.until("Not sent: hi (nobody here is called xxx")
        self.assertEqual(eva.run("return document.querySelectorAll('#log b:not(.name), #log img').length"), 0)
        eva.until("evil <U+202E>txt.exe<U+2066> <U+001B>[31m")
        links = eva.run("return [...document.querySelectorAll('#log a')].map((link) => [link.href, link.rel])")
        self.assertEqual(links, [[f"https://example.org/{end}", "noopener noreferrer"] for end in ("a_(b)?c=1", "d")])
        self.assertEqual(eva.lines(".mention"), [next(line for line in eva.lines() if "hello eva" in line)])
        self.assertEqual(eva.lines(".action"), ["waves at everybody", "nods"])
        self.assertEqual(eva.lines(".private"), ["psst, only for you", "psst back"])
        self.assertGreaterEqual(eva.run("return document.querySelectorAll('[data-day]').length"), 3)
        self.assertEqual(eva.run("return document.querySelectorAll('.past').length"), 100)
        self.looks(eva)
        eva.close()

    def looks(self, eva: Page) -> None:
        """Nothing is too wide or too faint, or covers where one types: on phone and desktop, light and dark."""
        for width, dark in itertools.product((1200, 400), (False, True)):
            eva.look(width, dark)
            with self.subTest(width=width, dark=dark):
                eva.wait(f"innerWidth === {width} && $('people').hidden === {'true' if width < 700 else 'false'}")
                self.assertEqual(eva.run("return document.documentElement.scrollWidth"), width)
                if width < 700:
                    eva.picture(f"narrow-{'dark' if dark else 'light'}")
                    eva.press("#toggle")
                    eva.wait("!$('people').hidden")
                    box = "{0}.getBoundingClientRect()"
                    inside = f"{box.format('$(`people`)')}.bottom <= {box.format('$(`composer`)')}.top"
                    self.assertTrue(eva.run(f"return {inside}"), "the drawer covers where one types")
                eva.picture(f"{'narrow-names' if width < 700 else 'wide'}-{'dark' if dark else 'light'}")
                count, least, where = eva.run(CONTRAST)
                self.assertGreater(count, 50)
                self.assertGreaterEqual(least, 4.5, where)
                if width < 700:
                    eva.type("\ue00c", "body")  # Escape
                    eva.wait("$('people').hidden")
        eva.run("log.scrollTop = document.querySelectorAll('[data-day]')[1].offsetTop - 200")
        eva.wait("!state.stuck")
        eva.picture("narrow-day-dark")
        eva.look(1200)
        eva.run("log.scrollTop = document.querySelectorAll('[data-day]')[1].offsetTop - 200")
        eva.picture("wide-day-light")

    def names_and_topic(self) -> None:
        """Who is here, with ranks, and the topic are up to date; a tap on a name begins a line to them."""
        zoe, bob = self.page("zoe", "#tea"), self.person("tom")
        zoe.wait("$('channel').textContent === '#tea' && $('list').innerText === 'zoe\\nyou, operator'")
        bob.send("/join #tea\n")
        bob.until("tom joined (2 here)")
        zoe.type("/mode +v tom\n/topic Earl Grey\n")
        zoe.wait("$('topic').textContent === 'Earl Grey' && $('list').innerText.includes('tom\\nvoice')")
        bob.send("/away lunch\n/nick tommy\n")
        zoe.wait("$('list').innerText === 'zoe\\nyou, operator\\ntommy\\nvoice, away'")
        zoe.ask("POST", "/refresh")
        zoe.wait("$('list').innerText === 'zoe\\nyou, operator\\ntommy\\nvoice, away'")
        zoe.press("#list li:last-child button")
        self.assertEqual(zoe.run("return draft.value"), "tommy: ")
        bob.send("/quit\n")
        zoe.wait("$('list').innerText === 'zoe\\nyou, operator' && $('toggle').textContent === '1 here'")
        zoe.type("\ue009a\ue000/join #chat\n")
        zoe.wait("$('channel').textContent === '#chat' && !location.hash")
        zoe.until("said yesterday")
        zoe.wait("!state.timer && state.caught && !state.listing")
        zoe.run("ON.system({ event: 'names', text: '', users: ['kim'], ranks: [''] }, state.listing = true)")
        zoe.wait("$('list').innerText.includes('kim')")  # although there is no line of it
        zoe.close()

    def keyboard(self) -> None:
        """All goes without a mouse; what an input method composes is not sent."""
        kim, bob = self.page("kim"), self.person("bartholomew")
        kim.until("bartholomew joined")
        kim.type("ba")
        kim.run("draft.dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter', isComposing: true }))")
        kim.type("\ue004")
        self.assertEqual(kim.run("return draft.value"), "bartholomew: ")
        kim.type("one\ue008\ue007\ue000two\n")  # Shift-Enter
        self.assertEqual([bob.until("kim: "), bob.until("kim: ")], ["kim: bartholomew: one", "kim: two"])
        kim.type("\ue013")  # Up
        self.assertEqual(kim.run("return draft.value"), "bartholomew: one\ntwo")
        kim.type("\ue009a\ue000/to\ue004")
        self.assertEqual(kim.run("return draft.value"), "/topic ")
        kim.type("\ue009a\ue000\ue003")
        seen: list[list[str]] = []
        while ["toggle", "solid"] not in seen and len(seen) < 20:  # backwards, by Shift-Tab
            kim.type("\ue008\ue004\ue000", "*:focus")
            focus = "document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle"
            seen.append(kim.run(f"return [{focus}]"))
        self.assertIn(["toggle", "solid"], seen)
        self.assertIn(["log", "solid"], seen)
        kim.close()

    def pasted_lines(self) -> None:
        """Several lines are asked about, and no command among them is obeyed; a long one is split between words."""
        pat, bob = self.page("pat"), self.person("pete")
        paste = """
            const data = new DataTransfer();
            data.setData("text/plain", arguments[0]);
            draft.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
            setDraft(arguments[0]);
        """
        pat.run(paste, "one\n/quit\n\nthree")
        pat.type("\n")
        pat.ask("POST", "/alert/dismiss")
        self.assertEqual(pat.run("return draft.value"), "one\n/quit\n\nthree")
        pat.type("\n")
        self.assertEqual(pat.ask("GET", "/alert/text"), "Send 3 lines as one message?")
        pat.ask("POST", "/alert/accept")
        self.assertEqual([bob.until("pat: ") for _ in range(3)], ["pat: one", "pat: /quit", "pat: three"])
        self.assertEqual(pat.run("return log.lastChild.querySelector('.text').innerText"), "one\n/quit\n\nthree")
        pat.run(paste, "\n".join(["line"] * 40))
        pat.type("\n")
        self.assertEqual(pat.ask("GET", "/alert/text"), "Send 40 lines, each as a message?")
        pat.ask("POST", "/alert/accept")
        self.assertEqual([bob.until("pat: ") for _ in range(40)], ["pat: line"] * 40)
        words = " ".join(f"wort{number}é" for number in range(90))
        pat.run("setDraft(arguments[0])", words)
        pat.type("\n")
        pieces = [bob.until("pat: ")[5:]]
        while len(" ".join(pieces)) < len(words):
            pieces.append(bob.until("pat: ")[5:])
        self.assertEqual(" ".join(pieces), words)
        pat.close()

    def scrolling(self) -> None:
        """What arrives is followed at the bottom only; further up, older lines come, and the place stays."""
        sam, bob = self.page("sam"), self.person("seb")
        sam.wait("state.caught && state.stuck && log.scrollTop > 300")
        place = "document.querySelectorAll('.line')[5].getBoundingClientRect().top"
        text = "document.querySelectorAll('.line')[5].innerText"
        sam.run("log.scrollTop = 310")
        sam.wait("!state.stuck")
        before = sam.run(f"return [{place}, {text}]")
        bob.send("below\n")
        sam.wait("$('newer').innerText === '1 new below'")
        self.assertEqual(sam.run(f"return [{place}, {text}]"), before)
        self.assertEqual(sam.count("what was said first"), 0)
        sam.run("log.scrollTop = 0")
        sam.until("what was said first")
        sam.wait("!state.fetching && !state.older")
        self.assertEqual(sam.count("what was said first"), 1)
        self.assertGreater(sam.run("return log.scrollTop"), 300, "the place was lost")
        sam.press("#newer")
        sam.wait("state.stuck && $('newer').hidden")
        bob.send("".join(f"{number} of many\n" for number in range(1200)))
        sam.until("1199 of many")
        self.assertEqual(sam.wait("state.queue.length === 0 && log.childElementCount"), 1000)
        self.assertTrue(sam.run("return log.scrollHeight - log.scrollTop - log.clientHeight < 30"))
        sam.close()


class BackInTheBrowser(BrowserCase):
    def test_the_page(self) -> None:
        plays = self.reload_and_second_tab, self.nobody_looks, self.offline, self.restart
        self.play(*plays, self.foreign_origin, self.password)

    def reload_and_second_tab(self) -> None:
        """Neither shows anybody a ghost: the same person comes back, with the draft; of two tabs, one has the chat."""
        rae, bob = self.page("rae"), self.person("rob")
        rae.type("kept\n")
        bob.until("rae: kept")
        rae.type("a draft")
        rae.ask("POST", "/refresh")
        rae.until("kept")
        self.assertEqual((rae.count("kept"), rae.run("return draft.value")), (1, "a draft"))
        second = self.page("")
        second.ask("POST", "/url", url=rae.address)
        second.until("kept")
        rae.wait("$('status').innerText.includes('another tab')")
        rae.picture("another-tab")
        rae.press("#act")
        second.wait("$('status').innerText.includes('another tab')")
        rae.type("!\n/quit bye\n")
        bob.until("rae left")
        rae.wait("$('status').innerText.includes('You have left')")
        self.assertEqual(
            [line for line in bob.seen if "rae" in line], ["rae: kept", "rae: a draft!", "*** rae left: bye"]
        )
        for page in (rae, second):
            page.close()

    def nobody_looks(self) -> None:
        """While nobody looks, unread lines are counted in the title, and a line shows where one left off."""
        lea, bob = self.page("lea"), self.person("leo")
        lea.run("document.hasFocus = () => false; dispatchEvent(new Event('blur'))")
        bob.send("unseen one\nunseen two, lea\n")
        lea.wait("document.title === '(2) #chat'")
        self.assertEqual(lea.lines(".new"), ["unseen one"])
        lea.picture("left-off")
        lea.run("delete document.hasFocus; dispatchEvent(new Event('focus'))")
        lea.wait("document.title === '#chat'")
        lea.type("seen\n")
        lea.wait("!document.querySelector('.new')")
        lea.close()

    def offline(self) -> None:
        """What is typed without a network is sent once it is there, once; what was missed is shown, once."""
        off, bob = self.page("olaf"), self.person("otto")
        nowhere = {"offline": True, "latency": 0, "throughput": 0}
        off.ask("POST", "/chromium/network_conditions", network_conditions=nowhere)
        off.wait("$('status').innerText.includes('Connection lost')")
        off.type("typed meanwhile\n")
        bob.send("missed\n")
        off.wait("document.querySelector('.pending')")
        off.picture("reconnecting")
        off.ask("DELETE", "/chromium/network_conditions")
        self.assertEqual(bob.until("olaf"), "olaf: typed meanwhile")
        off.wait("$('status').hidden && !document.querySelector('.pending')")
        off.until("missed")
        self.assertEqual([line for line in off.lines(".chat")[-2:]], ["missed", "typed meanwhile"])
        off.close()

    def restart(self) -> None:
        """The same when the server is killed, and comes back."""
        ron = self.page("ron")
        ron.type("before\n")
        ron.wait("!document.querySelector('.pending')")
        self.program.kill()
        self.program.communicate(timeout=PATIENCE)
        ron.wait("!state.joined")
        ron.type("meanwhile\n")
        self.begin()
        bob = self.person("rick")
        bob.send("/who\n")
        bob.until("In #chat")
        ron.wait("state.joined && !document.querySelector('.pending')")
        bob.send("after\n")
        ron.until("after")
        self.assertEqual([line for line in ron.lines(".chat")[-3:]], ["before", "meanwhile", "after"])
        ron.close()

    def foreign_origin(self) -> None:
        """Somebody else's page cannot speak here."""
        page = self.page("mallory")
        attempt = """
            const done = arguments[1], socket = new WebSocket(arguments[0]);
            socket.onopen = () => done("let in");
            socket.onerror = () => done("refused");
        """
        for address, answer in ((page.address, "let in"), (self.browser.other, "refused"), ("data:,x", "refused")):
            page.ask("POST", "/url", url=address)
            url = f"ws://mallory.localhost:{self.port}/"
            self.assertEqual(page.ask("POST", "/execute/async", script=attempt, args=[url]), answer, address)
        page.close()

    def password(self) -> None:
        """It is asked for where one is wanted; and a name that is taken is asked for again."""
        _, port = self.server(env={**os.environ, "CHAT_PASSWORD": "sesame"})
        self.peer(port, "una\nsesame\n", "una joined")
        una = Page(self.browser, port, "")
        una.type("a(b\n", "#name")
        una.wait("$('refusal').innerText && !$('secret').hidden")
        una.type("\ue009a\ue000Una\n", "#name")
        una.wait("!$('entry').hidden && $('name').value === 'Una' && !$('secret').hidden")
        una.picture("password")
        una.type("wrong\n", "#password")
        una.wait("$('refusal').innerText && !$('entry').hidden && state.password === 'wrong'")
        una.type("\ue009a\ue000sesame\n", "#password")
        una.wait("$('refusal').innerText.includes('taken') && !$('entry').hidden")
        una.type("\ue009a\ue000ute\n", "#name")
        una.until("ute joined")
        una.close()


def ngircd_config(name: str, port: object, slow: bool, more: str) -> str:
    """`slow`: with the flood limits that Debian installs; `more` begins with further lines of [Global]."""
    limits = "" if slow else "MaxPenaltyTime = 0\n"
    limits = f"[Limits]\nMaxConnectionsIP = 0\n{limits}[Options]\nIdent = no\nPAM = no\nDNS = no\n"
    return f"[Global]\nName = {name}\nInfo = test\nListen = 127.0.0.1\nPorts = {port}\n{more}{limits}"


class Foreign:
    """A server of somebody else's, with its flood limits, and ann, a raw connection, as operator of #chat."""

    def __init__(self, case: ProgramCase, name: str, config: str, *command: str) -> None:
        self.name = name
        path = temporary_folder(case) / "conf"
        self.port = held_port(case)
        self.ann: Any = mock.Mock()
        path.write_text(config.format(port=self.port, folder=path.parent), encoding="ascii")
        self._command = [part.format(path=path) for part in command]
        case.addCleanup(self.stop)
        self.begin()

    def begin(self) -> None:
        """Starts it, and lets ann in."""
        quiet = subprocess.DEVNULL
        self.program = subprocess.Popen(self._command, stdin=quiet, stdout=quiet, stderr=quiet)
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                self.ann = Peer(self.port, "PASS sesame\r\nNICK ann\r\nUSER ann 0 * :ann\r\n")
                break
            if time.monotonic() > end:
                raise AssertionError(f"{self.name} does not start")
            time.sleep(0.02)
        self.ann.until(" 001 ")
        self.ann.send("JOIN #chat\r\n")
        self.ann.until(" 366 ann #chat ")

    def stop(self) -> None:
        self.ann.close()
        if self.program.poll() is None:
            self.program.terminate()
        self.program.wait(PATIENCE)


@unittest.skipUnless(shutil.which("ngircd") and shutil.which("inspircd"), "needs ngircd and inspircd")
class ForeignServers(SeatCase):
    """The client at other people's servers.

    What was seen with those of Debian 12 and their own flood limits; InspIRCd with its modules for echo-message,
    message-tags and server-time, without which it is like ngircd:
                                                 ngircd 26.1             InspIRCd 3.15
    talk, /me, private messages, in UTF-8        yes                     yes
    channels like #café                          yes                     yes
    channels like &local                         yes                     it has none
    a name with accents                          José becomes Jose       José becomes Jose
    a long name                                  cut to 9 characters     as it is
    a name that is taken                         bob, bob2, bob3 ...     bob, bob2, bob3 ...
    long lines                                   in pieces               in pieces
    60 long lines through a pipe                 all, in half a minute   all, in a minute
    server password, channel key, kicked, back   yes                     yes
    killed, banned                               says so and stops       says so and stops
    the server comes back                        in the channel again;   in the channel again; unconfirmed lines
                                                 lines may be lost       are sent again, perhaps twice
    our own line is shown                        when it is sent         when it is echoed
    what was said before, or while we were away  no                      no
    """

    FLOOD = 60 if os.environ.get("CHAT_TEST_LONG") else 12

    def test_people_and_pipes(self) -> None:
        """All at once, for these servers do about one thing a second for each of us."""
        config = ngircd_config("irc.test", "{port}", True, "Password = sesame\n")
        ngircd = "ngircd", config, "ngircd", "-n", "-f", "{path}"
        inspircd = "inspircd", INSPIRCD, "inspircd", "--config={path}", "--nofork", "--runasroot"
        with concurrent.futures.ThreadPoolExecutor() as pool:
            jobs = [
                *(pool.submit(self.visit, Foreign(self, *server)) for server in (ngircd, inspircd)),
                pool.submit(self.flood, Foreign(self, *ngircd), "Josephine"),
                pool.submit(self.flood, Foreign(self, *inspircd), "Josephine-Alexandra"),
            ]
            for job in jobs:
                job.result()

    def pipe(self, server: Foreign, *args: str, password: str = "sesame") -> subprocess.Popen[str]:
        environment = {**os.environ, "CHAT_PASSWORD": password}
        return self.start("client", f"irc://127.0.0.1:{server.port}/chat", *args, env=environment)

    def flood(self, server: Foreign, name: str) -> None:
        """More at once than the server takes, under a name that it does not; and a stranger without the password."""
        lines = [f"{number} {'é' * 200}" for number in range(self.FLOOD)]
        flood = self.pipe(server, "--name", "Joséphine-Alexandra", *[arg for line in lines for arg in ("-m", line)])
        _, err = self.pipe(server, "-m", "x", password="").communicate(timeout=PATIENCE)
        self.assertRegex(err, r"^chat\.py: [^\n]* password[^\n]* in CHAT_PASSWORD or with --password-file\n$")
        self.assertEqual([server.ann.until("PRIVMSG").partition(" :")[2] for _ in lines], lines)
        _, err = flood.communicate(timeout=PATIENCE)
        remark = f"*** Joséphine-Alexandra is not possible here; you are {name}\n"
        self.assertEqual((flood.returncode, err), (0, remark))

    def visit(self, server: Foreign) -> None:
        args = ["client", f"irc://ann@127.0.0.1:{server.port}/chat"]
        seat = Seat(self, args, 200, CHAT_PASSWORD="sesame", NO_COLOR="1")
        self.shows(seat, r"\[#chat 2\] ann2>")
        self.shows(seat, r"\*\*\* ann is taken; you are ann2\n")
        self.talk(server.ann, seat)
        self.thrown_out(server.ann, seat)
        self.gone(server, seat)
        seat.type("/quit bye\r")
        self.assertEqual(seat.wait(), 0)

    def shows(self, seat: Seat, pattern: str) -> None:
        seat.until(lambda: re.search(pattern, seat.glass.text()))

    def talk(self, ann: Peer, seat: Seat) -> None:
        seat.type("grüß dich 你好\r/me wäves\r/msg ann psst\r")
        self.assertRegex(ann.until("PRIVMSG"), "^:ann2!.* PRIVMSG #chat :grüß dich 你好$")
        self.assertRegex(ann.until("PRIVMSG"), "^:ann2!.* PRIVMSG #chat :\x01ACTION wäves\x01$")
        self.assertRegex(ann.until("PRIVMSG"), "^:ann2!.* PRIVMSG ann :psst$")
        self.shows(seat, r"\d \[private to ann\] ann2: psst")
        self.assertEqual(seat.glass.text().count("ann2: grüß"), 1)
        ann.send("PRIVMSG ann2 :\x01VERSION\x01\r\nPRIVMSG ann2 :so só\r\nPRIVMSG #chat :an alle\r\n")
        self.shows(seat, r"\[private\] ann: so só\n")
        self.shows(seat, " ann: an alle\n")
        self.assertNotIn("VERSION", seat.glass.text())
        seat.type("é" * 700 + "\r")
        pieces: list[str] = []
        while len("".join(pieces)) < 700:
            line = ann.until("PRIVMSG #chat")
            self.assertLessEqual(len(line.encode()) + 2, 512)
            pieces.append(line.partition(" :")[2])
        self.assertEqual("".join(pieces), "é" * 700)

    def thrown_out(self, ann: Peer, seat: Seat) -> None:
        ann.send("MODE #chat +k key\r\nKICK #chat ann2 :enough\r\n")
        self.shows(seat, "ann2 was kicked out by ann: enough")
        self.shows(seat, "you are no longer in #chat; /join #chat may bring you back")
        seat.type("/join #chat\r")
        self.shows(seat, r"\*\*\* Error: Cannot join channel \(")
        seat.type("/join #chat key\r")
        ann.until("JOIN")
        ann.send("PRIVMSG #chat :welcome back\r\n")
        self.shows(seat, "ann: welcome back")

    def gone(self, server: Foreign, seat: Seat) -> None:
        server.stop()
        self.shows(seat, "was lost: ")
        seat.type("said meanwhile\r")
        self.shows(seat, r"  \.\.\. ann2: said meanwhile")
        server.begin()
        self.shows(seat, r"\*\*\* connected again; what was said meanwhile is not known here")
        server.ann.send("PRIVMSG #chat :here again\r\n")
        self.shows(seat, "ann: here again")
        self.shows(seat, r"\d ann2: said meanwhile")
        self.assertNotIn("perhaps twice", seat.glass.text())  # it was not sent before


class ForeignClient:
    """An IRC client that others wrote, as a person uses it: lines that are typed, and text on its screen."""

    FILES: dict[str, str] = {}  # that it finds
    COMMAND: Sequence[str]
    SCREEN: Sequence[str] = ()  # files of what it shows
    INPUT: dict[str, tuple[str, str]] = {}  # once a file is there: a named pipe, and the form of a line for it
    DO = {
        "join": "/join #chat", "say": "{}", "msg": "/msg ann {}", "topic": "/topic {}", "away": "/away {}",
        "nick": "/nick {}", "quit": "/quit {}",
    }  # fmt: skip
    LOOKS: dict[str, str]  # regular expressions of what is seen

    def __init__(self, case: unittest.TestCase, port: int) -> None:
        self.case, self.folder = case, temporary_folder(case)
        values = {"folder": self.folder, "port": port}
        for path, text in self.FILES.items():
            (self.folder / path).write_text(text % values, encoding="utf-8")
        command, quiet = [part % values for part in self.COMMAND], subprocess.DEVNULL
        env = {**os.environ, "HOME": str(self.folder), "LC_ALL": "C.UTF-8", "TERM": "screen"}
        self.program = subprocess.Popen(command, env=env, cwd=self.folder, stdin=quiet, stdout=quiet, stderr=quiet)
        case.addCleanup(self.end)

    def type(self, line: str) -> None:
        pipe, form = next(found for path, found in self.INPUT.items() if (self.folder / path).exists())
        self.until((self.folder / pipe).exists)
        (self.folder / pipe).write_text(form.format(line) + "\n", encoding="utf-8")

    def screen(self) -> str:
        found = [self.folder / path for path in self.SCREEN if (self.folder / path).exists()]
        return "\n".join(path.read_text(encoding="utf-8") for path in found)

    def do(self, what: str, text: str = "") -> None:
        self.type(self.DO[what].format(text))

    def until(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end:
                self.case.fail(f"the screen is\n{self.screen()}")
            time.sleep(0.02)

    def sees(self, what: str, *texts: str) -> None:
        pattern = re.compile(self.LOOKS[what].format(*map(re.escape, texts)), re.DOTALL)
        self.until(lambda: pattern.search(self.screen()))

    def end(self) -> None:
        if self.program.poll() is None:
            self.program.terminate()
        self.program.communicate(timeout=PATIENCE)


class Irssi(ForeignClient):
    """In a tmux of its own, with everything in one window."""

    CONFIG = """settings = {
        "fe-text" = { paste_verify_line_count = "0"; };
        "fe-common/core" = { use_status_window = "no"; autocreate_windows = "no"; autocreate_query_level = "NONE";
            autocreate_own_query = "no"; };
        "irc/core" = { cmd_queue_speed = "1msec"; cmds_max_at_once = "100"; };
    };"""
    IRSSI = "irssi --home=%(folder)s -c 127.0.0.1 -p %(port)s -n foreign"
    FILES = {"config": CONFIG, "tmux": f'new-session -d -s irc -x 120 -y 60 "{IRSSI}"\nset -s exit-empty on\n'}
    COMMAND = ["tmux", "-u", "-D", "-f", "%(folder)s/tmux", "-S", "%(folder)s/socket"]
    LOOKS = {
        "past": r"!chat\.local Said here before.*José> früher\n.*!chat\.local End of what was said before",
        "said": r"{}> {}\n", "private": r"\[{}\(ann@localhost\)\] {}\n",
        "topic": r"-!- {} changed the topic of #chat to: {}\n", "self": r"-!- You're now known as {1}\n",
        "nick": r"-!- {} is now known as {}\n", "kicked": r"-!- {2} was kicked from #chat by {0} \[{1}\]\n",
    }  # fmt: skip

    def tmux(self, what: str, *args: str) -> str:
        command = ["tmux", "-u", "-S", f"{self.folder}/socket", what, "-t", "irc", *args]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=PATIENCE, check=False)
        return done.stdout.decode()

    def screen(self) -> str:
        return self.tmux("capture-pane", "-p", "-J", "-S", "-")

    def type(self, line: str) -> None:
        self.tmux("send-keys", "-l", line)
        self.tmux("send-keys", "Enter")


class Weechat(ForeignClient):
    """Without a screen; typed into by a pipe, and read where it logs what it shows."""

    RUN = (
        "/set logger.file.flush_delay 0; /set fifo.file.path %(folder)s/in; /set irc.server_default.anti_flood 0; "
        "/set irc.server_default.anti_flood_prio_low 0; /set irc.server_default.anti_flood_prio_high 0; "  # before 4.0
        "/server add local 127.0.0.1/%(port)s -notls -nicks=foreign; /connect local"
    )
    COMMAND = ["weechat-headless", "-d", "%(folder)s", "-P", "irc,logger,fifo", "-r", RUN]
    SCREEN = [f"logs/irc.{name}.weechatlog" for name in ("server.local", "local.#chat", "local.ann")]
    INPUT = {SCREEN[1]: ("in", "irc.local.#chat *{}"), "": ("in", "irc.server.local *{}")}
    DO = {**ForeignClient.DO, "join": "/join -server local #chat"}
    LOOKS = {
        "past": r"Notice\(chat\.local\)[^\n]*: Said here.*\tJosé\tfrüher\n.*Notice[^\n]*: End of what was said",
        "said": r"\t@?{}\t{}\n", "private": r"\t{}\t{}\n",
        "topic": r"\t--\t{} has (?:changed|set) topic for #chat .*to \"{}\"\n",
        "self": r"\t--\tYou are now known as {1}\n", "nick": r"\t--\t{} is now known as {}\n",
        "kicked": r"\t<--\t{0} has kicked {2} \({1}\)\n",
    }  # fmt: skip


class Sic(ForeignClient):
    """Standard input and output."""

    COMMAND = ["sh", "-c", "mkfifo in; exec sic -h 127.0.0.1 -p %(port)s -n foreign <>in >screen"]
    SCREEN = ["screen"]
    INPUT = {"": ("in", "{}")}
    DO = {
        "join": ":j #chat", "say": "{}", "msg": ":m ann {}", "topic": ":TOPIC #chat :{}", "away": ":AWAY :{}",
        "nick": ":NICK {}", "quit": ":QUIT :{}",
    }  # fmt: skip
    LOOKS = {
        "past": r">< NOTICE \(#chat\): Said here before.*<José> früher\n.*>< NOTICE \(#chat\): End of what was said",
        "said": r"#chat       : [^\n]*<{}> {}\n", "private": r"[^\n]*<{}> {}\n",
        "topic": r"{} *: [^\n]*>< TOPIC \(#chat\): {}\n", "self": r"{} *: [^\n]*>< NICK \([^\n]*{}\n",
        "nick": r"{} *: [^\n]*>< NICK \([^\n]*{}\n", "kicked": r"{0} *: [^\n]*>< KICK \(#chat {2}\): {1}\n",
    }  # fmt: skip


class Ii(ForeignClient):
    """Files and named pipes."""

    COMMAND = ["ii", "-i", "%(folder)s", "-s", "127.0.0.1", "-p", "%(port)s", "-n", "foreign"]
    SCREEN = [f"127.0.0.1/{place}out" for place in ("", "#chat/", "ann/")]
    INPUT = {"127.0.0.1/#chat": ("127.0.0.1/#chat/in", "{}"), "": ("127.0.0.1/in", "{}")}
    DO = {
        "join": "/j #chat", "say": "{}", "msg": "/j ann {}", "topic": "/t {}", "away": "/a {}", "nick": "/n {}",
        "quit": "/q {}",
    }  # fmt: skip
    LOOKS = {
        "past": r"Said here before.*End of what was said before.*<José> früher\n",  # in two files
        "said": r" <{}> {}\n", "private": r" <{}> {}\n",
        "topic": r" -!- {} changed topic to \"{}\"\n", "self": r" -!- changed nick to \"{1}\"\n",
        "nick": r" -!- {} changed nick to {}\n", "kicked": r" -!- {0} kicked {2}  \(\"{1}\"\)\n",
    }  # fmt: skip


class RealClients(ServerCase):
    """People with the clients that they have.

    What was seen with those of Debian 12:
                                                        irssi 1.4.3   weechat 3.8   sic 1.1   ii 1.8
    joins, talks both ways, privately; all of Unicode   yes           yes           yes       yes
    topic, away, new names, being kicked, quit          yes           yes           yes       yes
    shows what was said before, and when                yes           yes           yes       when: in the server's file
    asks for CHATHISTORY itself                         no            no            no        no
    sends of its own accord                             WHOX, MODE b  WHOX, MODE
    Irssi sends a command each 2.5 s.
    """

    STEPS = [  # what the client does and ann receives, or what ann sends; and what the client then shows
        ("say", "hello José: 你好", "PRIVMSG #chat :hello José: 你好", "", "said", "foreign", "hello José: 你好"),
        ("", "", "", "PRIVMSG #chat :Grüße, Борис 😀", "said", "ann", "Grüße, Борис 😀"),
        ("msg", "psst Ω", "PRIVMSG ann :psst Ω", ""),
        ("", "", "", "PRIVMSG foreign :psssst", "private", "ann", "psssst"),
        ("topic", "Tee & Тема", "TOPIC #chat :Tee & Тема", "", "topic", "foreign", "Tee & Тема"),
        ("", "", "", "TOPIC #chat :Kaffee", "topic", "ann", "Kaffee"),
        ("nick", "Борис", "NICK :Борис", "", "self", "foreign", "Борис"),
        ("", "", "", "NICK Анна", "nick", "ann", "Анна"),
        ("", "", "", "KICK #chat Борис :genug davon", "kicked", "Анна", "genug davon", "Борис"),
    ]

    @unittest.skipUnless(shutil.which("irssi") and shutil.which("tmux"), "needs irssi and tmux")
    def test_irssi(self) -> None:
        self.talk(Irssi(self, self.port))

    @unittest.skipUnless(shutil.which("weechat-headless"), "needs weechat-headless")
    def test_weechat(self) -> None:
        self.talk(Weechat(self, self.port))

    @unittest.skipUnless(shutil.which("sic"), "needs sic")
    def test_sic(self) -> None:
        self.talk(Sic(self, self.port))

    @unittest.skipUnless(shutil.which("ii"), "needs ii")
    def test_ii(self) -> None:
        self.talk(Ii(self, self.port))

    def talk(self, client: ForeignClient) -> None:
        ann, jose = self.irc("ann"), self.irc("José")
        jose.send("PRIVMSG #chat :früher\r\nQUIT\r\n")
        ann.until("QUIT")
        client.until(lambda: "End of MOTD" in client.screen())
        client.do("join")
        ann.until(":foreign!")
        client.sees("past")
        for act, typed, heard, said, *shown in self.STEPS:
            if typed:
                client.do(act, typed)
                self.assertRegex(ann.until(heard.split()[0]), f"^:foreign!.* {heard}$")
            else:
                ann.send(f"{said}\r\n")
            if shown:
                client.sees(*shown)
        client.do("join")
        ann.until(":Борис!")
        client.do("away", "gone home")
        self.eventually(lambda: self.is_away("Борис", ann), "it is not away")
        ann.send("PRIVMSG Борис :there?\r\n")
        self.assertEqual(ann.until(" 301 "), ":chat.local 301 Анна Борис :gone home")
        client.do("quit", "bye")
        self.assertRegex(ann.until("QUIT"), "^:Борис!.* QUIT :Quit: bye$")
        client.until(lambda: client.program.poll() is not None)

    @staticmethod
    def is_away(name: str, asker: Peer) -> bool:
        asker.send(f"USERHOST {name}\r\n")
        return f" :{name}=-" in asker.until(" 302 ")


class Recorder(chat.UserInterface):
    """A person who talks as fast as it is confirmed, and remembers all that is shown; in a thread of its own."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.client = chat.Client("127.0.0.1", port, name, "#chat")
        self.client.ui = self
        self.shown: list[str] = []  # what was said, in order
        self.confirmed: list[str] = []  # of one's own
        self._silent = True
        self._done = False
        self._said = 0
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        with contextlib.suppress(chat.FatalError):  # a line that was not delivered, at a server that is wrong
            self.client.run()
        self.client.wakeup.close()

    def talk(self, silent: bool = False, done: bool = False) -> None:
        """Talks from now on, or no more, or leaves. Any thread."""
        self._silent, self._done = silent, done
        self.client.wakeup.wake()

    def show(self, message: Message, mine: bool) -> None:
        if message.command == "PRIVMSG":
            self.shown.append(message.text)
            if mine:
                self.confirmed.append(message.text)

    def update(self) -> None:
        if self._done and self.client.uplink.phase != chat.Phase.LEAVING:
            self.client.leave()
        while self.client.entered and not self._silent and len(self.client.queue) < 3:
            self._said += 1
            self.client.enter(f"{self.name} {self._said}", False)


class Durable(ProgramCase):
    """Nothing that was acknowledged is lost, doubled or out of order, whatever is killed."""

    ROUNDS = 100 if LONG else 10

    def setUp(self) -> None:
        self.folder = temporary_folder(self)
        self.history = str(self.folder / "history")
        self.port = held_port(self)  # also between one server and the next
        self.file = "chat.py"
        for name, seconds in (("RETRY_S", 0.02), ("RETRY_MAX_S", 0.1)):
            patch = mock.patch.object(chat, name, seconds)
            patch.start()
            self.addCleanup(patch.stop)

    def serve(self) -> subprocess.Popen[str]:
        return self.server("--port", str(self.port), "--history", self.history, file=self.file)[0]

    def printed(self, *args: str, **more: Any) -> tuple[str, str]:
        """What is printed of what was stored, and complained."""
        out, err = self.start("history", self.history, *args, **more).communicate(timeout=PATIENCE)
        return out, err

    def findings(self, crew: list[Recorder]) -> list[str]:
        """What is wrong with what was confirmed, shown and stored."""
        stored = [json.loads(line)["text"] for line in self.printed("--json")[0].splitlines()]
        found = []
        for person in crew:
            for name, texts in (("shown", person.shown), ("stored", stored)):
                lost = set(person.confirmed) - set(texts)
                if lost:
                    found.append(f"{len(lost)} confirmed to {person.name} but not {name}, as {min(lost)}")
            if len(person.shown) != len(set(person.shown)):
                found.append(f"doubled at {person.name}")
            order = iter(stored)
            if not all(text in order for text in person.shown):
                found.append(f"{person.name} saw another order than was stored, or something that was not")
            if person.shown != crew[0].shown:
                found.append(f"{person.name} saw something else than {crew[0].name}")
        if len(stored) != len(set(stored)):
            found.append("stored twice")
        return found

    def disturb(self, rng: random.Random, server: subprocess.Popen[str], crew: list[Recorder], kill_only: bool) -> Any:
        """Kills the server, ends it or cuts some connections, a while later; returns the server that is there then."""
        goal = sum(len(person.confirmed) for person in crew) + rng.randrange(100)
        self.eventually(lambda: sum(len(person.confirmed) for person in crew) > goal, "they say no more")
        act = 0 if kill_only else rng.randrange(3)
        if act < 2:
            server.terminate() if act else server.kill()
            server.wait(PATIENCE)
            return self.serve()
        for person in rng.sample(crew, 4):
            sock = person.client.uplink.sock
            if sock:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        return server

    def chaos(self, rng: random.Random, rounds: int, kill_only: bool = False) -> list[str]:
        server = self.serve()
        crew = [Recorder(f"c{number}", self.port) for number in range(10)]
        self.eventually(lambda: all(person.client.entered for person in crew), "not all came in")
        for person in crew:
            person.talk()
        for _ in range(rounds):
            server = self.disturb(rng, server, crew, kill_only)
        for person in crew:
            person.talk(silent=True)
        if not kill_only:  # everybody gets everything; a server that forgets may not let them
            self.eventually(lambda: not any(len(person.client.queue) for person in crew), "some is unconfirmed")
            everything = {text for person in crew for text in person.confirmed}
            self.eventually(lambda: all(everything <= set(person.shown) for person in crew), "some is not shown")
        for person in crew:
            person.talk(silent=True, done=True)
            person.thread.join(PATIENCE)
        server.terminate()
        self.assertEqual(server.wait(PATIENCE), 0 if os.name == "posix" else 1)
        return self.findings(crew)

    def test_kills_and_cuts(self) -> None:
        seed = random.randrange(1 << 32)
        self.assertEqual(self.chaos(random.Random(seed), self.ROUNDS), [], f"seed {seed}")

    def test_a_server_that_confirms_before_it_stores_is_caught(self) -> None:
        wrong = (
            "LATER.extend(messages)\n        if len(LATER) > 500:\n            hub.history.append(LATER)\n"
            "            LATER.clear()\n"
        )
        mutant = SOURCES[chat].replace("hub.history.append(messages, list(hub.unsaved.values()))\n", wrong)
        mutant = mutant.replace("VERSION =", "LATER: list = []\nVERSION =", 1)
        self.assertEqual(mutant.count("LATER"), 5)
        path = self.folder / "mutant.py"
        path.write_text(mutant, encoding="utf-8")
        self.file = str(path)
        found = self.chaos(random.Random(1), 3, kill_only=True)
        self.assertTrue(any("but not stored" in line for line in found), found)

    def talking(self) -> tuple[Peer, Peer]:
        """ann and bob, who has heard of ann: one."""
        ann, bob = (joined(self, self.port, f"{name}\n", "joined") for name in ("ann", "bob"))
        ann.send("one\n")
        bob.until("ann: one")
        return ann, bob

    @unittest.skipUnless(sys.platform.startswith("linux"), "needs prlimit")
    def test_a_full_disk(self) -> None:
        import resource

        server = self.serve()
        ann, bob = self.talking()
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (1 << 12, resource.RLIM_INFINITY))
        for peer, line in ((ann, "two\n"), (bob, "/me waits\n")):
            peer.send(line)
            peer.until("*** Error: not said, because it cannot be stored: ")
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        ann.send("three\n")
        self.assertEqual(bob.until("ann: "), "ann: three")
        server.terminate()
        self.assertEqual(server.wait(PATIENCE), 0)
        stored = [line.rpartition("#chat ")[2] for line in self.printed()[0].splitlines()]
        self.assertEqual(stored, ["ann: one", "ann: three"])

    @MOVES_OPEN_FILES
    def test_a_file_that_is_taken_away_is_noticed_before_the_next_line_is_confirmed(self) -> None:
        self.serve()
        ann, _ = self.talking()
        (self.folder / "history").rename(self.folder / "history.1")
        ann.send("two\n")
        ann.until("*** Error: not said, because it cannot be stored: ")

    @unittest.skipIf(os.name != "posix", "needs rights of a folder")
    def test_a_transcript_where_nothing_may_be_created(self) -> None:
        history = chat.SqliteHistory(self.history)
        history.append([("#chat", Kept.said(1, "hello"))])
        history.close()
        (self.folder / "history-lock").unlink()
        self.folder.chmod(0o555)
        self.addCleanup(self.folder.chmod, 0o755)
        bound: dict[str, Any] = {}
        if os.getuid() == 0:  # who may do everything
            if not sys.platform.startswith("linux"):
                self.skipTest("must not be run by root")
            prctl = ctypes.CDLL(None).prctl
            bound = {"preexec_fn": lambda: prctl(24, 1)}  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
        out, err = self.printed(**bound)
        self.assertEqual((out.partition("#chat ")[2], err), ("bob: hello\n", ""))

    def test_a_transcript(self) -> None:
        history = chat.SqliteHistory(self.history)
        day = 86_400_000_000
        said = (("#b", "first"), ("#a", "sec\x1bond"), ("#b", "\x01ACTION waves\x01"))
        for number, (channel, text) in enumerate(said):
            message = Message("PRIVMSG", (channel, text), "bob!b@h", Kept.said(day * 365 * 40 + number * day).tags)
            history.append([(channel, message)])
        history.close()
        noon = time.strftime("%Y-%m-%dT%H:%M", time.localtime(86400 * 365 * 40 + 43200))
        lines = ["#b bob: first", "#a bob: sec\\x1bond", "#b * bob waves"]
        for args, texts in (((), lines), (("--channel", "#B"), lines[::2]), (("--since", noon), lines[1:])):
            out, err = self.printed(*args)
            self.assertEqual(([line[20:] for line in out.splitlines()], err), (texts, ""))
        self.history = str(self.folder / "none")
        self.assertEqual(self.printed(), ("", f"chat.py: there is no {self.history}\n"))


# The load tester: its checker, its statistics and report, then the whole program.

ALL_PASS = {name: ("pass", 0, "") for name in CHECKS}
SAW = re.compile(r"(\w+) saw (\d+) \(from s\d+\) before (\d+) \(from s\d+\), at (\d+) and (\d+)")
OTHER_WAY = re.compile(r"; (\w+) saw them the other way, at (\d+) and (\d+)$")


def sent(senders: Sequence[int], after: Sequence[int] | None = None) -> Sent:
    return Sent(array("i", senders), array("i", after or [-1] * len(senders)))


def saw(name: str, order: Iterable[int], sender: int = -1, span: tuple[int, int] = (0, 99), *strange: bytes) -> History:
    return History(name, sender, array("I", order), list(strange), *span)


def seen(*rows: str) -> list[History]:
    """What c0, c1 ... got, a digit for each message; `/1-3`: only 1 and 2 were to come to it; `=0`: it is sender 0."""
    found = []
    for number, row in enumerate(rows):
        ((order, first, last, sender),) = re.findall(r"^(\d*)(?:/(\d)-(\d))?(?:=(\d))?$", row)
        found.append(saw(f"c{number}", map(int, order), int(sender or -1), (int(first or 0), int(last or 99))))
    return found


def results(findings: Sequence[Finding]) -> dict[str, tuple[str, int, str]]:
    return {name: (verdict, count, witness) for name, verdict, count, witness in findings}


class Case(NamedTuple):
    title: str
    sent: Sent
    histories: list[History]
    failing: dict[str, tuple[int, str]]  # check -> count, witness; all others are as `rest`
    echo: bool = True
    rest: str = "pass"


FOUR = sent([0, 1, 0, 1])  # messages 0 and 2 of s0, 1 and 3 of s1
SIX = sent([0, 1, 2, 3, 4, 5])
C0 = saw("c0", [0, 1, 2, 3])
CASES = [
    Case("all alike", FOUR, seen("0123", "0123"), {}),
    Case("not in the order of the schedule", FOUR, seen("1032", "1032"), {}),
    Case("one lost, that another one has", FOUR, seen("1023", "023"),
         {"loss": (1, "c1 never got 1 (from s1); c0 did, at 0")}),
    Case("the last lost", FOUR, seen("0123", "012"), {"loss": (1, "c1 never got 3 (from s1); c0 did, at 3")}),
    Case("lost for all: the smallest is shown, all are counted", FOUR, seen("02", "023"),
         {"loss": (3, "c0 never got 1 (from s1), nor did anyone else")}),
    Case("nothing at one receiver", FOUR, seen("", "0123"), {"loss": (4, "c0 never got 0 (from s0); c1 did, at 0")}),
    Case("joined late and left early", FOUR, seen("0123", "12/1-3", "/2-2"), {}),
    Case("a race of join and leave", FOUR, seen("0123", "0123/1-3", "0/4-4"), {}),
    Case("each bound of a stay", FOUR, seen("0123", "03/1-3"), {"loss": (2, "c1 never got 1 (from s1); c0 did, at 1")}),
    Case("alike, but not there for the same", FOUR, seen("0123", "0/0-1", "0/0-1"), {}),
    Case("alike, and one was there longer", FOUR, seen("0123", "0/0-1", "0/0-2"),
         {"loss": (1, "c2 never got 1 (from s1); c0 did, at 1")}),
    Case("never sent, so not lost", sent([0, -1, 1]), seen("02"), {}),
    Case("without echo", FOUR, seen("13=0", "02=1", "0123"), {}, False),
    Case("own ones although without echo", FOUR, seen("0123=0", "012=1"), {}, False),
    Case("with echo, own ones are demanded", FOUR, seen("13=0", "0123"),
         {"loss": (2, "c0 never got 0 (from s0); c1 did, at 0")}),
    Case("without echo, those of others are demanded", FOUR, seen("1=0", "02=1"),
         {"loss": (1, "c0 never got 3 (from s1), nor did anyone else")}, False),
    Case("one doubled", FOUR, seen("0123", "01213"), {"duplicate": (1, "c1 got 1 (from s1) again at 3, first at 1")}),
    Case("copies at two receivers alike and more at a third", FOUR, seen("01233", "01233", "001023"),
         {"duplicate": (4, "c2 got 0 (from s0) again at 1, first at 0")}),
    Case("altered: strange, and lost", FOUR, [C0, saw("c1", [0, 1, 3], -1, (0, 4), b"2 Xello")],
         {"loss": (1, "c1 never got 2 (from s0); c0 did, at 2"),
          "corruption": (1, "c1 got a line that nobody sent: b'2 Xello'")}),
    Case("the same copy at two: the first receiver, and at the first place", FOUR, seen("011223", "01123"),
         {"duplicate": (3, "c0 got 1 (from s1) again at 2, first at 1")}),
    Case("the longest line that is not cut", FOUR, [C0, saw("c1", C0.order, -1, (0, 4), b"x" * 80)],
         {"corruption": (1, "c1 got a line that nobody sent: b'" + "x" * 80 + "'")}),
    Case("the shortest strange line, cut", FOUR, [C0, saw("c1", C0.order, -1, (0, 4), b"y" * 99, b"\r" + b"x" * 80)],
         {"corruption": (2, "c1 got a line that nobody sent: b'\\r" + "x" * 79 + "'...")}),
    Case("a number out of range, twice, and with it a place further on", FOUR,
         [C0, saw("c1", [0, 4_000_000_000, 1, 3, 2, 4_000_000_000])],
         {"corruption": (2, "c1 got message 4000000000 at 1, which nobody sent"),
          "order": (1, "c1 saw 3 (from s1) before 2 (from s0), at 3 and 4; c0 saw them the other way, at 3 and 2")}),
    Case("a number that was never sent, at two", sent([0, -1, 0]), seen("02", "021", "021"),
         {"corruption": (2, "c1 got message 1 at 2, which nobody sent")}),
    Case("all saw one sender's messages backwards: the closest two", FOUR, seen("2310", "2310"),
         {"fifo": (4, "c0 saw 3 (from s1) before 1 (from s1), at 1 and 2")}),
    Case("a doubled one counts where it came first", FOUR, seen("0123", "012301"),
         {"duplicate": (2, "c1 got 0 (from s0) again at 4, first at 0")}),
    Case("places are those of the first arrival, duplicates included", FOUR, seen("0123", "002123"),
         {"duplicate": (2, "c1 got 0 (from s0) again at 1, first at 0"),
          "order": (1, "c1 saw 2 (from s0) before 1 (from s1), at 2 and 3; c0 saw them the other way, at 2 and 1")}),
    Case("two swapped at one receiver of three: the majority is right", FOUR, seen("1023", "0123", "0123"),
         {"order": (1, "c0 saw 1 (from s1) before 0 (from s0), at 0 and 1; c1 saw them the other way, at 1 and 0")}),
    Case("the closest of several disagreements", SIX, seen("012345", "012345", "120354"),
         {"order": (2, "c2 saw 5 (from s5) before 4 (from s4), at 4 and 5; c0 saw them the other way, at 5 and 4")}),
    Case("the closest at any receiver, and of its opposites the first", SIX,
         seen("012345", "01234", "0123", "301245", "021345"),
         {"loss": (3, "c2 never got 4 (from s4); c0 did, at 4"),
          "order": (2, "c4 saw 2 (from s2) before 1 (from s1), at 1 and 2; c0 saw them the other way, at 2 and 1")}),
    Case("two of two swapped across a third: one step back", FOUR, seen("2013", "1203"),
         {"fifo": (2, "c0 saw 2 (from s0) before 0 (from s0), at 0 and 1"),
          "order": (1, "c1 saw 1 (from s1) before 0 (from s0), at 0 and 2; c0 saw them the other way, at 2 and 1")}),
    Case("no two share two messages", FOUR, seen("3/3-4", "10/0-2"), {}),
    Case("two agree where both were, through a third", SIX, seen("02=1", "10=2", "12=0"),
         {"loss": (9, "c0 never got 3 (from s3), nor did anyone else")}, False),
    Case("three that disagree only together", sent([0, 1, 2]), seen("12=0", "20=1", "01=2"),
         {"order": (1, "3 receivers together fit no order: c2 saw 0 (from s0) before 1 (from s1), at 0 and 1; "
                       "c0 saw 1 (from s1) before 2 (from s2), at 0 and 1; "
                       "c1 saw 2 (from s2) before 0 (from s0), at 0 and 1")}, False),
    Case("all saw the reply first", sent([0, 1], [-1, 0]), seen("10", "10"),
         {"causality": (2, "c0 saw 1 (from s1) before 0 (from s0), at 0 and 1; s1 had received 0 before it sent 1")}),
    Case("a reply without the question", sent([0, 1, 0], [-1, 0, -1]), seen("12/1-3"), {}),
    Case("a reply with a smaller number", sent([0, 1], [1, -1]), seen("10"), {}),
    Case("the closest reply, of two that came first", sent([0, 1, 2, 2], [3, 3, -1, -1]), seen("0213"),
         {"causality": (2, "c0 saw 1 (from s1) before 3 (from s2), at 2 and 3; s1 had received 3 before it sent 1")}),
    Case("nobody", FOUR, [], {}, rest="unknown"),
    Case("nothing received", FOUR, seen("", ""), {}, rest="unknown"),
    Case("nothing sent", sent([]), seen(""), {}, rest="unknown"),
    Case("only an invented number, nothing sent", sent([-1]), seen("0"),
         {"corruption": (1, "c0 got message 0 at 0, which nobody sent")}, rest="unknown"),
    Case("only a strange line", sent([0]), [saw("c0", [], -1, (0, 1), b"?")],
         {"loss": (1, "c0 never got 0 (from s0), nor did anyone else"),
          "corruption": (1, "c0 got a line that nobody sent: b'?'")}, rest="unknown"),
]  # fmt: skip


class CheckerTables(unittest.TestCase):
    """Small histories with their exact findings."""

    maxDiff = None

    def test_cases(self) -> None:
        for title, messages, histories, failing, echo, rest in CASES:
            with self.subTest(title):
                fails = {name: ("FAIL", *found) for name, found in failing.items()}
                found = loadtest.check(messages, histories, echo)
                self.assertEqual(results(found), {**{name: (rest, 0, "") for name in CHECKS}, **fails})
                self.assertEqual([finding.check for finding in found], list(CHECKS))

    def test_only_what_was_asked_for(self) -> None:
        wrong = [C0, saw("c1", [5, 3, 1, 1], -1, (0, 4), b"?")]
        everything = results(loadtest.check(sent(FOUR.senders, [1, -1, -1, 1]), wrong, True))
        self.assertNotIn("pass", [verdict for verdict, _, _ in everything.values()])
        for size in range(len(CHECKS) + 1):
            for asked in combinations(CHECKS, size):
                for histories, given in ((wrong, everything), ([], {name: ("unknown", 0, "") for name in CHECKS})):
                    expected = {name: given[name] if name in asked else ("skipped", 0, "") for name in CHECKS}
                    found = loadtest.check(sent(FOUR.senders, [1, -1, -1, 1]), histories, True, asked)
                    self.assertEqual(results(found), expected, asked)


class Played(NamedTuple):
    sent: Sent
    histories: list[History]
    echo: bool


def clean_run(rng: random.Random) -> Played:
    """A run of a server without faults; its order is not the schedule's; some receivers come late or leave early."""
    receivers, number, echo = rng.randint(7, 9), rng.randint(18, 36), rng.random() < 0.5
    speakers = rng.choice([receivers, receivers, 2, 4])
    senders = [rng.randrange(speakers) for _ in range(number)]
    slots = sorted(range(number), key=lambda n: n + 4 * rng.random())
    own = [iter([n for n in range(number) if senders[n] == s]) for s in range(speakers)]
    order = [next(own[senders[n]]) for n in slots]
    histories = []
    for r in range(receivers):
        start, stop = 0, number
        if r >= 6 and rng.random() < 0.7:
            start, stop = sorted(rng.sample(range(number + 1), 2))
        sender = r if r < speakers else -1
        got = [n for n in order[start:stop] if echo or senders[n] != sender]
        span = max(order[:start], default=-1) + 1, min(order[stop:], default=number)
        histories.append(saw(f"c{r}", got, sender, (span[0], max(span))))
    rng.shuffle(histories)
    received = {history.sender: set(history.order) for history in histories}
    after = [-1] * number
    for place, n in enumerate(order):
        earlier = [m for m in order[:place] if m in received[senders[n]]]
        after[n] = rng.choice([-1, *earlier[-5:]])
    return Played(sent(senders, after), histories, echo)


def tiny_run(rng: random.Random) -> Played:
    """Few messages, each receiver with some of them, in an order that is or is not that of others."""
    number, chaos, few = rng.randint(1, 6), rng.choice([0.0, 0.5, 2.0, 9.0]), rng.random() < 0.4
    senders = [rng.randrange(-1 if rng.random() < 0.1 else 0, 3) for _ in range(number)]
    after = [rng.randrange(-1, number) for _ in range(number)]
    histories = []
    for r in range(rng.randint(1, 9)):
        order = [n for n in range(number) if rng.random() < rng.choice([0.5, 1.0])]
        order.sort(key=lambda n: n * 0.7 + chaos * rng.random())
        if few:  # so that no two need to disagree
            order = rng.sample(range(number), min(number, 2))
        if order and rng.random() < 0.2:
            order.insert(rng.randint(0, len(order)), rng.choice([*order, number + 1]))
        strange = [b"?"] * (rng.random() < 0.05)
        first, last = sorted(rng.choices(range(number + 1), k=2))
        histories.append(saw(f"c{r}", order, rng.randrange(-1, 3), (first, last), *strange))
    return Played(sent(senders, after), histories, rng.random() < 0.5)


# A mutation changes what one receiver saw, and returns how often its order then steps back.


def swap(rng: random.Random, run: Played, victim: History) -> int:
    place = rng.randrange(len(victim.order) - 1)
    victim.order.insert(place, victim.order.pop(place + 1))
    return 1


def drop(rng: random.Random, run: Played, victim: History) -> int:
    victim.order.pop(rng.choice([rng.randrange(len(victim.order)), -1]))
    return 0


def double(rng: random.Random, run: Played, victim: History) -> int:
    place = rng.randrange(len(victim.order))
    victim.order.insert(rng.randint(place + 1, len(victim.order)), victim.order[place])
    return 0


def alter(rng: random.Random, run: Played, victim: History) -> int:
    victim.strange.append(b"%d altered" % victim.order.pop(rng.randrange(len(victim.order))))
    return 0


def invent(rng: random.Random, run: Played, victim: History) -> int:
    number = len(run.sent.senders) + rng.choice([0, 1, 1 << 31])
    victim.order.insert(rng.randint(0, len(victim.order)), number)
    return 0


def delay(rng: random.Random, run: Played, victim: History) -> int:
    place = rng.randrange(len(victim.order) - 1)
    victim.order.insert(place + rng.randint(1, 12), victim.order.pop(place))
    return 1


def swap_of_one_sender(rng: random.Random, run: Played, victim: History) -> int:
    order, senders = victim.order, run.sent.senders
    place = rng.randrange(len(order) - 1)
    again = [n for n in range(place + 1, len(order)) if senders[order[n]] == senders[order[place]]]
    if again:
        order[place], order[again[0]] = order[again[0]], order[place]
    return min(again[0] - place, 2) if again else 0


def reply_first(rng: random.Random, run: Played, victim: History) -> int:
    place = rng.randrange(len(victim.order))
    question = run.sent.after[victim.order[place]]
    if question not in victim.order:
        return 0
    victim.order.insert(victim.order.index(question), victim.order.pop(place))
    return 1


Mutation = Callable[[random.Random, Played, History], int]
MUTATIONS: dict[Mutation, str] = {
    swap: "order", drop: "loss", double: "duplicate", alter: "corruption", invent: "corruption", delay: "order",
    swap_of_one_sender: "fifo", reply_first: "causality",
}  # fmt: skip


def first_arrivals(run: Played, history: History) -> list[int]:
    known = {n for n, sender in enumerate(run.sent.senders) if sender >= 0}
    return [n for n in dict.fromkeys(history.order) if n in known]


def counts(run: Played) -> dict[str, int]:
    """What each check but that of the order must count, straight from its definition."""
    senders, after = run.sent
    known = {n for n, sender in enumerate(senders) if sender >= 0}
    found = dict.fromkeys(CHECKS, 0)
    for history in run.histories:
        order = first_arrivals(run, history)
        place = dict(zip(order, itertools.count()))
        demanded = [n for n in known if history.first <= n < history.last]
        streams = [[n for n in order if senders[n] == sender] for sender in set(senders)]
        found["loss"] += sum(n not in place and (run.echo or senders[n] != history.sender) for n in demanded)
        found["duplicate"] += sum(n in known for n in history.order) - len(order)
        found["corruption"] += len(history.strange) + sum(n not in known for n in history.order)
        found["fifo"] += sum(one > two for stream in streams for one, two in zip(stream, stream[1:]))
        found["causality"] += sum(place.get(after[n], -1) > place[n] for n in order)
    return found


class CheckerRandom(unittest.TestCase):
    """Random histories, against the definitions: clean runs, the same with one fault, and thousands of tiny ones."""

    def judge(self, run: Played, order: int | None, title: object) -> list[Finding]:
        """All is found as often as the definitions say, `order` as often as is said here, and has a true witness."""
        findings = loadtest.check(*run)
        expected = {**counts(run), "order": results(findings)["order"][1] if order is None else order}
        if not any(history.order or history.strange for history in run.histories):
            expected = dict.fromkeys(CHECKS, 0)
        received = any(first_arrivals(run, history) for history in run.histories)
        self.assertEqual({finding.check: finding.count for finding in findings}, expected, title)
        for _, verdict, count, witness in findings:
            self.assertEqual(verdict, "FAIL" if count else "pass" if received else "unknown", title)
            self.assertEqual(bool(witness), bool(count), title)
            self.assertTrueWitness(run, witness)
        pair = ("fifo", "causality")
        alone = [finding.count for finding in loadtest.check(*run, checks=pair) if finding.check in pair]
        self.assertEqual(alone, [expected[name] for name in pair], title)
        return findings

    def assertTrueWitness(self, run: Played, witness: str) -> None:  # noqa: N802
        """Every claim of `witness` holds in the histories."""
        orders = {history.name: list(history.order) for history in run.histories}
        for name, message, again, first in re.findall(r"(\w+) got (\d+) .* again at (\d+), first at (\d+)", witness):
            places = [place for place, n in enumerate(orders[name]) if n == int(message)]
            self.assertEqual(places[:2], [int(first), int(again)], witness)
        never = r"(\w+) never got (\d+) [^;]*(?:; (\w+) did, at (\d+))?"
        for name, message, other, place in re.findall(never, witness):
            self.assertNotIn(int(message), orders[name], witness)
            lucky = [other for other, order in orders.items() if int(message) in order]
            self.assertEqual([other] if other else [], lucky[:1], witness)
            self.assertEqual(place, str(orders[other].index(int(message))) if other else "", witness)
        claims = [(name, *map(int, numbers)) for name, *numbers in SAW.findall(witness)]
        self.assertEqual(bool(claims), " saw " in witness, witness)
        for (_, _, two, *_), (_, one, *_) in zip(claims, claims[1:]):
            self.assertEqual(two, one, witness)
        if "together" in witness:
            self.assertEqual(claims[-1][2], claims[0][1], witness)
        for name, one, two in OTHER_WAY.findall(witness):
            claims.append((name, claims[0][2], claims[0][1], int(two), int(one)))
        for name, first, second, at, then in claims:
            self.assertEqual((orders[name].index(first), orders[name].index(second)), (at, then), witness)
            self.assertLess(at, then, witness)

    def test_clean_runs_raise_no_alarm(self) -> None:
        for seed in range(400):
            run = clean_run(random.Random(seed))
            self.assertEqual(results(loadtest.check(*run)), ALL_PASS, seed)

    def test_every_mutant_is_caught(self) -> None:
        for mutate, check in MUTATIONS.items():
            with self.subTest(mutate.__name__):
                done = 0
                for seed in range(150):
                    rng = random.Random(seed)
                    run = clean_run(rng)
                    victim = rng.choice([history for history in run.histories if len(history.order) > 1])
                    for name, _, count, witness in self.judge(run, mutate(rng, run, victim), seed):
                        done += name == check and count > 0
                        if witness:
                            self.assertRegex(witness, rf"\b{victim.name} ", seed)
                self.assertGreater(done, 50)

    def test_the_same_fault_at_many_counts_for_each(self) -> None:
        for faulty in (1, 12, 40, 59):
            orders = [[*range(20)] if n >= faulty else [*range(9), 10, 9, *range(11, 20)] for n in range(100)]
            for n, order in enumerate(orders):  # no two alike
                order.remove(n % 8)
                order.remove(18 - n // 8 % 6)
            run = Played(sent(range(20)), [saw(f"c{n}", order) for n, order in enumerate(orders)], True)
            with self.subTest(faulty):
                self.judge(run, min(faulty, 100 - faulty), faulty)

    def test_tiny_runs(self) -> None:
        seen: dict[tuple[str, str], int] = {}
        for seed in range(3000):
            run = tiny_run(random.Random(seed))
            found = results(self.judge(run, None, seed))
            before = {pair for h in run.histories for pair in combinations(first_arrivals(run, h), 2)}
            disagree = any((two, one) in before for one, two in before)
            for middle, one, two in itertools.product(range(6), repeat=3):  # so that what comes before it follows
                before |= {(one, two)} if {(one, middle), (middle, two)} <= before else set()
            self.assertEqual(found["order"][0] == "FAIL", any(one == two for one, two in before), seed)
            self.assertEqual(bool(OTHER_WAY.search(found["order"][2])), disagree, seed)
            for name, (verdict, _, witness) in found.items():
                kind = "together" if "together" in witness else verdict
                seen[name, kind] = seen.get((name, kind), 0) + 1
        for name in CHECKS:
            for kind in ("pass", "FAIL", *(["together"] if name == "order" else [])):
                self.assertGreater(seen[name, kind], 25, f"too few to tell: {name} {kind}")

    def test_a_ring_has_a_cycle_as_witness_that_a_short_cut_makes_smaller(self) -> None:
        for size, more, length in ((3, [], 3), (4, [], 4), (30, [], 30), (6, [saw("c6", [2, 5], -1, (0, 0))], 4)):
            ring = [saw(f"c{n}", [n, (n + 1) % size], -1, (0, 0)) for n in range(size)]
            with self.subTest(size):
                found = results(self.judge(Played(sent(range(size)), [*ring, *more], True), 1, size))
                self.assertTrue(found["order"][2].startswith(f"{length} receivers together fit no order: c"), found)


EXAMPLE: dict[str, Any] = {
    "loadtest": "0.1", "when": "2026-11-20T05:00:00Z", "command": "python loadtest.py -n 200",
    "machine": {"python": "CPython 3.11.7", "system": "Linux 6.1 x86_64", "cpus": 2},
    "target": {"name": "chat.py", "host": "127.0.0.1", "port": 40123, "proto": "irc"},
    "load": {"clients": 200, "senders": 20, "rate": 1000.0, "duration_s": 10.0, "warmup_s": 1.0, "size": 64, "seed": 1},
    "join": {"connects_per_s": 2103.0, "all_joined_s": 0.21, "p50": 3.1, "p99": 20.4},
    "sent": 10000, "expected": 1990000, "deliveries": 1990000,
    "elapsed_s": 10.01, "deliveries_per_s": 198801.0, "messages_per_s": 999.0,
    "latency": {
        "corrected": {"samples": 1990000, "p50": 0.51, "p90": 1.2, "p99": 2.2, "p99.9": 5.1, "max": 8.0},
        "uncorrected": {"samples": 1990000, "p50": 0.48, "p90": 0.9996, "p99": 2.0, "p99.9": 4.9, "max": 7.9},
        "complete": {"samples": 10000, "p50": 0.72, "p90": 1.5, "p99": 3.1, "p99.9": 7.0, "max": 12345.0},
    },
    "histogram": [[0.25, 40], [0.315, 0], [0.4, 1], [0.5, 900000], [0.63, 600000], [0.8, 489959]],
    "curve": [[0.0, 0.2], [0.5, 0.51], [0.9, 1.2], [0.99, 2.2], [0.999, 5.1], [1.0, 8.0]],
    "over_time": [[0, 0.5, 2.1, 6.0], [1, 0.52, 2.3, 8.0], [2, None, None, None], [3, 0.5, 2.2, 5.5]],
    "fairness": {"best": 0.44, "worst": 0.61, "ratio": 1.39, "slowest": "c17"},
    "clock": "kernel (SO_TIMESTAMPNS)",
    "generator": {"late_p50": 0.06, "late_p99": 0.4, "late_max": 1.9, "cpu_share": 0.43,
                  "floor": {"p50": 0.4, "p99": 1.9}, "limited": False, "why": ""},
    "server": {"pid": 123, "cpu_s": 4.2, "cpu_ms_per_1000": 2.1, "rss_mb": 33.1, "threads": 202},
    "checks": [{"check": name, "verdict": "pass", "count": 0, "witness": ""} for name in CHECKS],
    "thresholds": [{"text": "p99>50ms", "value": 2.2, "exceeded": False}],
    "verdict": "PASS",
}  # fmt: skip
EXAMPLE_TEXT = """\
loadtest 0.1, 2026-11-20T05:00:00Z, CPython 3.11.7, Linux 6.1 x86_64, 2 CPUs

command      python loadtest.py -n 200
target       chat.py, 127.0.0.1:40123, irc
load         200 clients, 20 senders, 1,000 messages/s, 64 bytes
run          10 s after 1 s of warm-up, seed 1
join         2,103 connects/s, all joined in 210 ms, p50 3.10 ms, p99 20.4 ms
delivered    1,990,000 of 1,990,000, each checked, from 10,000 messages, in 10.0
             s
throughput   198,801 deliveries/s, 999 messages/s

latency          p50      p90      p99    p99.9      max    samples
corrected     510 us  1.20 ms  2.20 ms  5.10 ms  8.00 ms  1,990,000
uncorrected   480 us  1.00 ms  2.00 ms  4.90 ms  7.90 ms  1,990,000
complete      720 us  1.50 ms  3.10 ms  7.00 ms   12.3 s     10,000
clock        kernel (SO_TIMESTAMPNS)

 corrected <=   deliveries    share
       250 us           40    0.00%  .
       315 us            0    0.00%
       400 us            1    0.00%  .
       500 us      900,000   45.23%  ##########################################
       630 us      600,000   30.15%  ############################
       800 us      489,959   24.62%  #######################

fairness     receivers' p50 440 us to 610 us, ratio 1.39, slowest c17
server       2.10 ms CPU per 1,000 deliveries, 4.20 s CPU, 33.1 MB, 202 threads
generator    sent late by p50 60.0 us, p99 400 us, max 1.90 ms, 43% of a core
floor        p50 400 us, p99 1.90 ms for the same load against a bare reflector

checks       pass: loss, duplicate, corruption, fifo, order, causality
thresholds   p99>50ms not exceeded: 2.20 ms

PASS  1,990,000 of 1,990,000 deliveries, once, unchanged, in one order"""
POINTS = [[50, 0.2, 0.9, 1.9, 49000.0], [100, 0.3, None, None, 99000.0], [1000, 2.5, 12.0, 2.2, 398000.0]]
SWEEP = {"points": POINTS, "exponent": 1.02}


def changed(**changes: Any) -> dict[str, Any]:
    """The example with other values; `generator__limited=True` reaches into a section."""
    result = copy.deepcopy(EXAMPLE)
    for path, value in changes.items():
        section, _, key = path.rpartition("__")
        (result[section] if section else result)[key] = value
    return result


def verdicts(**verdicts: Any) -> list[dict[str, Any]]:
    """The example's checks, with (verdict, count, witness) for some of them."""
    passed = ("pass", 0, "")
    return [dict(zip(("check", "verdict", "count", "witness"), (name, *verdicts.get(name, passed)))) for name in CHECKS]


def nearest_rank(values: Sequence[float], quantile: Fraction) -> float:
    """The definition, slowly: the least value that at least `quantile` of all values do not exceed."""
    return min(v for v in values if sum(w <= v for w in values) >= max(1, math.ceil(quantile * len(values))))


class StatisticsTest(unittest.TestCase):
    def test_percentiles_are_those_of_the_definition(self) -> None:
        quantiles = {"p50": "0.5", "p90": "0.9", "p99": "0.99", "p99.9": "0.999", "max": "1"}
        dice = random.Random(3)
        for size in (1, 2, 3, 10, 99, 100, 101, 300):
            floats = array("d", (dice.lognormvariate(0, 2) for _ in range(size)))
            for values in (floats, array("I", (dice.randrange(50) for _ in range(size)))):
                with self.subTest(size=size, typecode=values.typecode):
                    slow = {name: nearest_rank(values, Fraction(q)) for name, q in quantiles.items()}
                    self.assertEqual(loadtest.summarize(values), {"samples": size, **slow})

    def test_percentiles_at_the_edges_of_ranks(self) -> None:
        thousand = array("I", range(1000, 0, -1))
        expected = {"samples": 1000, "p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
        self.assertEqual(loadtest.summarize(thousand, per_ms=1000), expected)
        self.assertEqual(thousand[0], 1000, "the caller's array is left as it was")
        self.assertEqual(loadtest.summarize(array("d")), {"samples": 0})

    def test_histogram(self) -> None:
        cases: list[Any] = [
            ("nothing", [], 1, []),
            ("one", [1.0], 1, [[1.0, 1]]),
            ("a bound belongs below it", [1.0, 1.25, 1.2500001], 1, [[1.0, 1], [1.25, 1], [1.6, 1]]),
            ("empty ones between are kept", [1.1, 2.4], 1, [[1.25, 1], [1.6, 0], [2.0, 0], [2.5, 1]]),
            ("zero and less", [-0.5, 0, 0.0005], 1, [[0.001, 3]]),
            ("integers of microseconds", [315, 316], 1000, [[0.315, 1], [0.4, 1]]),
            ("the first bounds in nanoseconds", [1250, 1251], 10**6, [[0.00125, 1], [0.0016, 1]]),
        ]
        for name, values, per_ms, expected in cases:
            with self.subTest(name):
                self.assertEqual(loadtest.histogram(values, per_ms), expected)

    def test_histogram_counts_everything_once(self) -> None:
        dice = random.Random(5)
        values = sorted(array("d", (dice.lognormvariate(0, 3) for _ in range(5000))))
        below = 0.0
        for upper, number in loadtest.histogram(values):
            self.assertEqual(number, sum(below < value <= upper for value in values))
            below = upper
        self.assertEqual(sum(number for _, number in loadtest.histogram(values)), 5000)

    def test_curve(self) -> None:
        dice = random.Random(7)
        for size in (1, 2, 7, 99, 100, 1000):
            values = sorted(dice.random() for _ in range(size))
            with self.subTest(size=size):
                points = loadtest.curve(values)
                for quantile, value in points:
                    exact = Fraction(quantile).limit_denominator(10**6)
                    self.assertEqual(value, nearest_rank(values, exact), quantile)
                self.assertEqual(points, sorted(points))
                self.assertEqual(points[-1], [1.0, values[-1]])
        self.assertEqual(loadtest.curve([]), [])
        quantiles = [quantile for quantile, _ in loadtest.curve(range(1, 10001), 1000)]
        for quantile in (0.0, 0.5, 0.75, 0.9, 0.99, 0.999, 0.9999):
            self.assertIn(quantile, quantiles)
        self.assertEqual(loadtest.curve([5, 8], 1000), [[q, 0.005] for q in (0.0, 0.2, 0.35, 0.5)] + [[1.0, 0.008]])

    def test_statistics_of_sorted_values_touch_few_of_them(self) -> None:
        class Counted(List[float]):
            touched = 0

            def __getitem__(self, index: Any) -> Any:
                Counted.touched += 1
                return super().__getitem__(index)

            def __iter__(self) -> Any:
                raise AssertionError("walked over all values")

        values = Counted(range(100000))
        self.assertTrue(loadtest.curve(values))
        self.assertTrue(loadtest.histogram(values))
        self.assertGreater(Counted.touched, 0)
        self.assertLess(Counted.touched, 4000)

    def test_exponent(self) -> None:
        cases: list[Any] = [
            ("linear", [(50, 100), (100, 200), (200, 400)], 1.0),
            ("quadratic", [(1, 3), (2, 12), (5, 75)], 2.0),
            ("flat", [(1, 7), (10, 7)], 0.0),
            ("least squares of 0, 1, 0 at 0, 1, 2", [(1, 1), (10, 10), (100, 1)], 0.0),
            ("zeros are skipped", [(0, 5), (5, 0), (1, 1), (10, 1000)], 3.0),
            ("one point", [(50, 100)], None),
            ("one x", [(50, 100), (50, 200)], None),
            ("none", [], None),
        ]
        for name, points, expected in cases:
            with self.subTest(name):
                found = loadtest.fit_exponent(points)
                self.assertEqual(found if found is None else round(found, 9), expected)


class ThresholdTest(unittest.TestCase):
    def test_parse(self) -> None:
        cases = {
            "p99>50ms": ("p99", ">", 50.0), "p50>0.5ms": ("p50", ">", 0.5), "max>=1s": ("max", ">=", 1000.0),
            "lost>0": ("lost", ">", 0.0), "p99.9>100us": ("p99.9", ">", 0.1), " cpu <= 2 ": ("cpu", "<=", 2.0),
            "throughput<1000000": ("throughput", "<", 1000000.0),
        }  # fmt: skip
        for text, expected in cases.items():
            with self.subTest(text):
                measure, comparison, limit = loadtest.parse_threshold(text)
                self.assertEqual((measure, comparison, round(limit, 12)), expected)

    def test_wrong(self) -> None:
        form = "(write it like 'p99>50ms', 'lost>0' or 'throughput<1000000')"
        cases = {text: f"not a threshold: {text!r} {form}" for text in ("", "p99", "p99=50ms", "p99>", "p99>-1ms")}
        cases["p99>50ms\nx"] = f"not a threshold: 'p99>50ms\\nx' {form}"
        known = "(known: p50, p90, p99, p99.9, max, throughput, cpu, lost)"
        cases["p98>50ms"] = f"unknown measure 'p98' in 'p98>50ms' {known}"
        cases["p99>50"] = "p99 needs a unit, which in 'p99>50' must be one of us, ms, s"
        cases["max>1min"] = "max needs a unit, which in 'max>1min' must be one of us, ms, s"
        cases["lost>0ms"] = "lost takes no unit, but 'lost>0ms' has 'ms'"
        for text, expected in cases.items():
            with self.subTest(text), self.assertRaises(ValueError) as caught:
                loadtest.parse_threshold(text)
            self.assertEqual(str(caught.exception), expected)

    def test_exceeded(self) -> None:
        over = ("p99>=2.2ms", "p99>2.1ms", "p99.9>5ms", "p50<=0.51ms", "throughput<198802", "cpu>2", "lost>=0")
        within = ("p99>2.2ms", "p50<0.51ms", "max>8s", "throughput<198801", "cpu>2.1", "lost>0")
        for text in (*over, *within):
            with self.subTest(text):
                self.assertIs(loadtest.exceeded(loadtest.parse_threshold(text), EXAMPLE), text in over)
        for text in ("p99>1s", "p99<1s", "lost>1000000", "throughput<1", "cpu>1000000"):
            with self.subTest(text, known=False):  # a gate must not open unseen
                self.assertTrue(loadtest.exceeded(loadtest.parse_threshold(text), {"latency": None, "server": None}))

    def test_lost_is_what_the_checker_counted(self) -> None:
        cases: list[Any] = [
            ("a duplicate does not make up for a loss", changed(checks=verdicts(loss=("FAIL", 3, ""))), 3),
            ("without the check", changed(checks=verdicts(loss=("skipped", 0, "")), deliveries=1989990), 10),
            ("without the check, with duplicates", changed(checks=None, deliveries=2000000), 0),
            ("not known", changed(checks=None, expected=None), None),
        ]
        for name, result, expected in cases:
            with self.subTest(name):
                self.assertEqual(loadtest.measured("lost", result), expected)


LIMITED = """
floor        p50 400 us, p99 1.90 ms for the same load against a bare reflector
             LIMITED: these figures show the limits of the generator, not of the
             server: it used 97% of a core
"""
FAILURES = """\
checks       pass: loss, duplicate, corruption
             skipped: causality
             unknown: fifo
             FAIL: order, 2 times
               c17 has m1 (place 8) before m2 (place 9)
               c18 has m2 (place 8) before m1 (place 9)
thresholds   p99>1ms EXCEEDED: 2.20 ms
             cpu>2 EXCEEDED: not known

FAIL  1,990,000 of 1,990,000 deliveries, order 2, exceeded p99>1ms, exceeded ..."""
SWEEP_TEXT = """\
clients      p50      p99  CPU/1,000 deliveries  deliveries/s
50        200 us   900 us               1.90 ms        49,000
100       300 us        -                     -        99,000
1,000    2.50 ms  12.0 ms               2.20 ms       398,000
the server's CPU per message grows as clients^1.02"""
VERSUS_TEXT = """\
median, range  chat.py   ngircd  ratio      sign test
p50             650 us  1.25 ms   0.52        p 0.031
  lowest        600 us  1.00 ms   0.47
  highest       700 us  1.50 ms   0.60
p99            9.00 ms        -      -              -
  lowest       9.00 ms        -      -
  highest      9.00 ms        -      -
deliveries/s   198,801  198,801   1.00     noise, p 1
  lowest       198,801  198,801   1.00
  highest      198,801  198,801   1.00
CPU/1,000      2.05 ms  2.10 ms   0.98  noise, p 0.22
  lowest       1.10 ms  2.00 ms   0.55
  highest      6.10 ms  2.20 ms   2.90
ratio: chat.py / ngircd, medians of 6 rounds; noise: a sign test over the rounds
gives p > 0.05; LIMITED by the load tester itself"""
FAULTS_TEXT = """\
fault   peers   lost  wrong  p99 undisturbed  disturbed  ratio  newcomers

silent    500      0      0          2.00 ms    2.50 ms   1.25    12.5 ms
PASS: connect and say nothing: connections 500, stayed 14, answers 1,200, closed
484 after 20.0 s (No name within 20 seconds), closed 2 (Reads too slowly
\\x1b[2J), they took 3% of a core

flood       1  1,234      2                -          -      -          -
FAIL: talk without end: not known; LIMITED by the load tester itself

FAIL  1 of 2 kinds of fault within bounds: nothing lost or wrong, p99 at most
200 ms or 10 times that of before, newcomers' p99 at most 1 s"""


HDR_TEXT = """\
       Value     Percentile TotalCount 1/(1-Percentile)

       0.200 0.000000000000          0           1.00
       0.510 0.500000000000     995000           2.00
       1.200 0.900000000000    1791000          10.00
       2.200 0.990000000000    1970100         100.00
       5.100 0.999000000000    1988010        1000.00
       8.000 1.000000000000    1990000
#[Max     =        8.000, Total count    =      1990000]
#[Values in milliseconds]
"""


class TextTest(unittest.TestCase):
    """One report as a whole, and what changes in it when a value does."""

    def report(self, **changes: Any) -> str:
        """The example with other values, which fits on a screen, and shows what is not known as such."""
        text = loadtest.text_report(changed(**changes))
        for line in text.split("\n"):
            self.assertLessEqual(len(line), 80, line)
            self.assertEqual(line, line.rstrip())
        self.assertLessEqual(text.count("\n") + 1, 40)
        self.assertNotIn("None", text)
        self.assertNotIn(", ,", text)
        return text

    def test_numbers(self) -> None:
        times = {
            0.51: "510 us", 0.0005: "0.50 us", 0.9994: "999 us", 0.9996: "1.00 ms", 1: "1.00 ms", 12.34: "12.3 ms",
            99.96: "100 ms", 999.4: "999 ms", 999.6: "1.00 s", 12345: "12.3 s", 2e6: "2,000 s", 0: "0 ms",
            -0.012: "-12.0 us",
        }  # fmt: skip
        short = {0.001: "1 us", 0.5: "500 us", 2: "2 ms", 1000: "1 s", 20000: "20 s"}
        counts = {0: "0", 7: "7", 0.5: "0.5", 33.14: "33.1", 999.4: "999", 1234.6: "1,235", 1990000: "1,990,000"}
        for table, text in ((times, loadtest.duration), (short, lambda ms: loadtest.duration(ms, 0)),
                            (counts, loadtest.count)):  # fmt: skip
            self.assertEqual({value: text(value) for value in table}, table)

    def test_the_example(self) -> None:
        self.assertEqual(self.report(), EXAMPLE_TEXT)
        self.assertEqual(loadtest.text_report(json.loads(json.dumps(EXAMPLE))), EXAMPLE_TEXT)
        self.assertEqual(loadtest.text_report({}), "UNKNOWN")
        self.assertEqual(loadtest.text_report({"verdict": "UNKNOWN", "deliveries": 0}), "UNKNOWN  nothing was received")

    def test_every_value_may_be_unknown(self) -> None:
        """Taking any one value away takes only what depends on it."""
        for key, value in EXAMPLE.items():
            for path in [key, *(f"{key}__{inner}" for inner in (value if isinstance(value, dict) else ()))]:
                with self.subTest(path):
                    self.report(**{path: None})
        gone = {
            "server": "\nserver", "server__rss_mb": " MB", "generator__floor": "floor", "join": "\njoin",
            "join__p99": ", p99 20.4 ms", "latency": "\nlatency", "latency__complete": "\ncomplete",
            "histogram": "deliveries    share", "thresholds": "thresholds",
        }  # fmt: skip
        for path, text in gone.items():
            with self.subTest(path):
                self.assertIn(text, EXAMPLE_TEXT)
                self.assertNotIn(text, self.report(**{path: [] if path in ("histogram", "thresholds") else None}))

    def test_what_a_value_changes(self) -> None:
        witness = "c17 has m1 (place 8) before m2 (place 9)\nc18 has m2 (place 8) before m1 (place 9)"
        found = verdicts(order=("FAIL", 2, witness), causality=("skipped", 0, ""), fifo=("unknown", 0, ""))
        over = [{"text": "p99>1ms", "value": 2.2, "exceeded": True}, {"text": "cpu>2", "value": None, "exceeded": True}]
        raw = "red \x1b[31m, bidi \u202e, half \ud800, \u043f\u0440\u0438"
        wrapped = "command      python loadtest.py --server-command x --server-command x\n"
        cases: list[tuple[dict[str, Any], str]] = [
            ({"latency__uncorrected": {"samples": 0}}, f"\nuncorrected        -{'        -' * 4}          0\n"),
            ({"load__rate": 0}, "load         200 clients, 20 senders, as fast as the server accepts, 64 bytes\n"),
            ({"generator__limited": True, "generator__why": "it used 97% of a core"}, LIMITED),
            ({"generator__limited": True}, "not of the\n             server\n"),
            ({"checks": found, "thresholds": over, "verdict": "FAIL"}, f"\n\n{FAILURES}"),
            ({"checks": verdicts(corruption=("FAIL", 1, raw))},
             "               red \\x1b[31m, bidi \\u202e, half \\ud800, \u043f\u0440\u0438\n"),
            ({"target__name": "x\r\ny\x07"}, "target       x\\r\\ny\\x07, 127.0.0.1:40123, irc\n"),
            ({"command": "python loadtest.py " + "--server-command x " * 4},
             f"{wrapped}             --server-command x --server-command x\n"),
            ({"command": "x" * 200}, f"command      {'x' * 67}\n"),
        ]  # fmt: skip
        for changes, text in cases:
            with self.subTest(changes):
                self.assertIn(text, self.report(**changes))
        self.assertTrue(self.report(**cases[4][0]).endswith(FAILURES))

    def test_verdicts(self) -> None:
        some = "1,990,000 of 1,990,000 deliveries"
        over = [{"text": "lost>0", "value": 3, "exceeded": True}]
        lost, unordered = verdicts(loss=("FAIL", 3, "")), verdicts(order=("skipped", 0, ""))
        twice, unknown = verdicts(duplicate=("skipped", 0, "")), verdicts(order=("unknown", 0, ""))
        cases: list[tuple[dict[str, Any], str]] = [
            ({"checks": lost, "deliveries": 1989997, "verdict": "FAIL"},
             "FAIL  1,989,997 of 1,990,000 deliveries, loss 3"),
            ({"thresholds": over}, f"PASS  {some}, exceeded lost>0"),
            ({"checks": unordered}, f"PASS  {some}, once, unchanged"),
            ({"checks": twice}, f"PASS  {some}, unchanged, in one order"),
            ({"checks": unknown, "verdict": "UNKNOWN"}, f"UNKNOWN  {some}, not known: order"),
            ({"deliveries": 0, "verdict": "UNKNOWN"}, "UNKNOWN  nothing was received"),
            ({"deliveries": None}, "PASS  once, unchanged, in one order"),
        ]  # fmt: skip
        for changes, expected in cases:
            with self.subTest(expected):
                self.assertEqual(self.report(**changes).split("\n")[-1], expected)

    def test_a_long_histogram_is_merged(self) -> None:
        text = loadtest.text_report({"histogram": [[bound, 10] for bound in loadtest.BOUNDS[:53]]})
        rows = text.split("\n")[1:-2]
        self.assertEqual(len(rows), 11)
        self.assertEqual(rows[0], "      2.50 us           50    9.43%  " + "#" * 42)
        self.assertEqual(rows[-1], "       160 ms           30    5.66%  " + "#" * 25)

    def test_sweep(self) -> None:
        self.assertEqual(loadtest.sweep_text(SWEEP), SWEEP_TEXT)
        self.assertEqual(loadtest.sweep_text({**SWEEP, "exponent": None}), SWEEP_TEXT.rpartition("\n")[0])

    def test_versus(self) -> None:
        """A difference that not all rounds show is called noise."""
        results = []
        for n in range(6):
            latency = {"corrected": {"p50": 0.6 + n / 50, "p99": 9.0}}
            cpu = {"cpu_ms_per_1000": (1.1, 2.0, 2.1, 2.1, 1.2, 6.1)[n]}
            results.append(changed(latency=latency, server=cpu, generator__limited=n == 4))
            cpu = {"cpu_ms_per_1000": (2.0, 2.1, 2.2, 2.2, 2.1, 2.1)[n]}
            latency = {"corrected": {"p50": (1.0, 1.1, 1.2, 1.3, 1.4, 1.5)[n]}}
            results.append(changed(target__name="ngircd", latency=latency, server=cpu))
        versus = loadtest.compare_result(["chat.py", "ngircd"], results, 6)
        self.assertEqual(loadtest.versus_text({"results": results, "versus": versus}), VERSUS_TEXT)

    def test_hdr(self) -> None:
        self.assertEqual(loadtest.hdr_text(EXAMPLE), HDR_TEXT)
        self.assertEqual(loadtest.hdr_text({}).count("\n"), 4)

    def test_openmetrics(self) -> None:
        """Families one after the other, each line of its form, and what is not known left out."""
        other = changed(target__name='a"b\\c', server=None, latency__corrected={"samples": 3, "p50": 1.5, "p99": None})
        text = loadtest.openmetrics_text([EXAMPLE, other])
        self.assertTrue(text.endswith("\n# EOF\n"))
        label = r'\w+="(?:[^"\\]|\\["\\])*"'
        form = rf"# (?:TYPE|UNIT|HELP) \w+ [^\n]+|# EOF|\w+{{{label}(?:,{label})*}} [0-9.e+-]+"
        for line in text.splitlines():
            self.assertRegex(line, rf"^(?:{form})$")
        families = [re.split(r"[ {]", line.replace("_count", ""))[0] for line in text.splitlines() if line[0] != "#"]
        self.assertEqual(len(list(itertools.groupby(families))), len(set(families)))
        first = 'target="chat.py",clients="200",run="1"'
        for line in (f'loadtest_latency_seconds{{{first},quantile="0.999"}} 0.0051', f"loadtest_passed{{{first}}} 1",
                     'loadtest_latency_seconds_count{target="a\\"b\\\\c",clients="200",run="2"} 3'):  # fmt: skip
            self.assertIn(f"\n{line}\n", text)
        self.assertEqual((text.count('run="1"'), text.count('run="2"')), (12, 7))

    def test_sign_test_is_that_of_the_definition(self) -> None:
        for wins in range(8):
            tails = [n for n in range(8) if abs(n - 3.5) >= abs(wins - 3.5)]
            expected = sum(math.factorial(7) / math.factorial(n) / math.factorial(7 - n) for n in tails) / 2**7
            pairs = [(2.0, 1.0)] * wins + [(1.0, 2.0)] * (7 - wins) + [(1.0, 1.0)]
            self.assertAlmostEqual(loadtest.sign_test(pairs), expected)
        self.assertEqual(loadtest.sign_test([]), 1.0)

    def test_limited_points_of_a_sweep_are_marked_and_not_fitted(self) -> None:
        results = [
            changed(load__clients=n, generator__limited=n > 100, server__cpu_ms_per_1000=n) for n in (50, 100, 200)
        ]
        results[2]["server"]["cpu_ms_per_1000"] = 1.0
        sweep = loadtest.sweep_result(results)
        self.assertAlmostEqual(sweep["exponent"], 2.0)
        lines = loadtest.sweep_text(sweep).splitlines()
        self.assertEqual([line.endswith("*") for line in lines], [False, False, False, True, False, False])
        self.assertIn("* LIMITED by the load tester itself", lines)
        page = loadtest.html_report({"results": results, "sweep": sweep, "versus": None})
        circles = [len(list(svg.iter("circle"))) for svg in figures(page)]
        self.assertEqual(circles, [0, 2, 1, 0, 0, 0])

    def test_faults(self) -> None:
        closed = [["No name within 20 seconds", 484, 20.0], ["Reads too slowly \x1b[2J", 2, None]]
        fate = {"connections": 500, "stayed": 14, "written": 0, "answers": 1200, "closed": closed, "cpu_share": 0.034}
        row = {"name": "silent", "what": "connect and say nothing", "peers": 500, "lost": 0, "wrong": 0, "fate": fate}
        known: dict[str, Any] = {"undisturbed": 2.0, "disturbed": 2.5, "newcomers": 12.5, "ratio": 1.25}
        known.update(limited=False, verdict="PASS")
        other = {"name": "flood", "what": "talk without end", "peers": 1, "lost": 1234, "wrong": 2, "fate": None}
        unknown = {**dict.fromkeys(known), "limited": True, "verdict": "FAIL"}
        self.assertEqual(loadtest.faults_text([{**row, **known}, {**other, **unknown}]), FAULTS_TEXT)

    def test_what_faults_did_is_the_sum_and_the_median_of_rounds(self) -> None:
        fault = {"name": "flood", "what": "talk", "peers": 1, "fate": None}
        results = []
        for before, since, lost in ((1.0, 3.0, 0), (5.0, 4.0, 2), (2.0, 9.0, 0)):
            times = {"undisturbed": before, "disturbed": since, "newcomers": 10 * since}
            halves = {half: {"samples": 9, "p99": p99} for half, p99 in times.items()}
            found = verdicts(loss=("FAIL", lost, "x"), fifo=("FAIL", 1, "x"), order=("FAIL", 1, "x"))
            results.append(changed(fault=fault, latency=halves, checks=found))
            results.append(changed(fault={**fault, "name": "storm"}, latency={"undisturbed": {"samples": 0}}))
        flood, storm = loadtest.summarize_faults(results)
        common = {**fault, "rounds": 3, "limited": False}
        times = {"undisturbed": 2.0, "disturbed": 4.0, "newcomers": 40.0, "ratio": 2.0}
        self.assertEqual(flood, {**common, "lost": 2, "wrong": 6, **times, "verdict": "FAIL"})
        unknown = {**dict.fromkeys(times), "verdict": "UNKNOWN"}
        self.assertEqual(storm, {**common, "name": "storm", "lost": 0, "wrong": 0, **unknown})

    def test_what_is_good_under_attack(self) -> None:
        for since, anew, limited, verdict in (
            (199.0, 999.0, False, "PASS"), (201.0, 9.0, False, "FAIL"), (201.0, 9.0, True, "UNKNOWN"),
            (9.0, 1001.0, False, "FAIL"), (None, 9.0, False, "UNKNOWN"), (9.0, None, False, "UNKNOWN"),
        ):  # fmt: skip
            row = {"lost": 0, "wrong": 0, "undisturbed": 9.0, "disturbed": since, "newcomers": anew, "limited": limited}
            self.assertEqual(loadtest.fault_verdict(row, ["PASS"]), verdict)
            self.assertEqual(loadtest.fault_verdict({**row, "lost": 1}, ["FAIL"]), "FAIL")
            self.assertEqual(loadtest.fault_verdict(row, ["PASS", "INTERRUPTED"]), "INTERRUPTED")
        row = {"lost": 0, "wrong": 0, "undisturbed": 30.0, "disturbed": 299.0, "newcomers": 1.0, "limited": False}
        self.assertEqual(loadtest.fault_verdict(row, ["PASS"]), "PASS")


def figures(page: str) -> list[ElementTree.Element]:
    """The charts of a page, parsed: what is not well-formed raises."""
    return [ElementTree.fromstring(svg) for svg in re.findall("<svg.*?</svg>", page, re.DOTALL)]


def lines_of(svg: ElementTree.Element) -> list[str]:
    return [path.get("d", "") for path in svg.iter("path") if path.get("class") == "line"]


class HtmlTest(unittest.TestCase):
    def page(self, *results: dict[str, Any], **more: Any) -> str:
        return loadtest.html_report({"results": list(results), "sweep": None, "versus": None, **more})

    def test_the_page_is_self_contained_and_has_the_text_report(self) -> None:
        page = self.page(EXAMPLE, sweep=SWEEP)
        self.assertTrue(page.startswith('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'))
        for forbidden in ("<script", "http:", "https:", "src=", "href=", "@import", "url("):
            self.assertNotIn(forbidden, page)
        self.assertIn("prefers-color-scheme: dark", page)
        text = EXAMPLE_TEXT.replace("'", "&#x27;").replace("<", "&lt;").replace(">", "&gt;")
        self.assertIn(f"<pre>{text}</pre>", page)

    def test_everything_is_escaped(self) -> None:
        evil = '<script>alert("1")</script>&\''
        found = verdicts(loss=("FAIL", 1, evil), order=("FAIL", 1, f"c1 {evil}"))
        result = changed(target__name=evil, command=evil, checks=found, fairness__slowest=evil, clock=evil)
        versus = {"names": [evil, "b"], "rounds": 1, "ratios": {}, "figures": {}, "p": {}}
        page = self.page(result, changed(target__name=evil), versus=versus, sweep=SWEEP)
        self.assertNotIn("<script", page)
        self.assertNotIn('alert("', page)
        self.assertIn("<h2>&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;&#x27; #1</h2>", page)
        self.assertEqual(len(figures(page)), 5)

    def test_charts_and_their_legends(self) -> None:
        page = self.page(EXAMPLE, changed(target__name="ngircd"), sweep=SWEEP)
        charts = [(svg.get("aria-label"), len(lines_of(svg))) for svg in figures(page)]
        titles = ["Latency by percentile", "Latency by clients", "Cost by clients"]
        titles += ["Latency over time, chat.py", "Latency over time, ngircd"]
        self.assertEqual(charts, list(zip(titles, (2, 2, 1, 3, 3))))
        legends = [re.findall("</b>(.*?)</span>", legend) for legend in re.findall('"legend">(.*?)</div>', page)]
        measures = ["p50", "p99", "max"]
        expected = [["chat.py", "ngircd"], ["p50", "p99"], ["CPU per 1,000 deliveries"], measures, measures]
        self.assertEqual(legends, expected)

    def test_axes(self) -> None:
        percentile, time = figures(self.page(EXAMPLE))
        latencies = ["200 us", "500 us", "1 ms", "2 ms", "5 ms", "10 ms"]
        labels = [text.text for text in percentile.iter("text")]
        title, height = "percentile of deliveries, logarithmic", "latency, logarithmic"
        self.assertEqual(labels, ["50%", "90%", "99%", "99.9%", *latencies, title, height])
        labels = [text.text for text in time.iter("text")]
        self.assertEqual(labels, ["0", "1", "2", "3", *latencies[1:], "time in seconds", height])

    def test_ticks_do_not_crowd(self) -> None:
        def labels(svg: ElementTree.Element) -> list[Any]:
            return [text.text for text in svg.iter("text") if text.get("text-anchor") == "middle"][:-2]

        for seconds, expected in ((6, list(range(7))), (7, list(range(0, 7, 2))), (120, list(range(0, 121, 20)))):
            with self.subTest(seconds=seconds):
                rows = [[second, 1.0, 1.0, 1.0] for second in range(seconds + 1)]
                (svg,) = figures(self.page(changed(curve=None, over_time=rows)))
                self.assertEqual(labels(svg), [str(second) for second in expected])
        points = [[clients, 0.002, 2000.0, 2.0, 1.0] for clients in (10, 11, 50, 1000, 60, 100)]
        (svg, _) = figures(self.page({}, sweep={"points": points, "exponent": None}))
        self.assertEqual(labels(svg), ["10", "50", "100", "1,000"])
        decades = ["10 us", "100 us", "1 ms", "10 ms", "100 ms", "1 s"]
        self.assertEqual([text.text for text in svg.iter("text") if text.get("text-anchor") == "end"], decades)

    def test_the_tail_is_logarithmic(self) -> None:
        """From 90% to 99% is as far as from 99% to 99.9%, and everything lies within the axes."""
        (svg, _) = figures(self.page(EXAMPLE))
        numbers = [float(number) for number in re.findall(r"[0-9.]+", lines_of(svg)[0].replace("h0", ""))]
        xs, ys = numbers[::2], numbers[1::2]
        self.assertAlmostEqual(xs[3] - xs[2], xs[4] - xs[3], delta=0.2)
        self.assertEqual((xs[0], xs[-1], xs), (70.0, 340.0, sorted(xs)))
        self.assertEqual((ys[0], ys), (230.0, sorted(ys, reverse=True)))
        self.assertGreater(ys[-1], 10.0)

    def test_a_second_without_deliveries_is_a_gap(self) -> None:
        (_, svg) = figures(self.page(EXAMPLE))
        for line in lines_of(svg):
            self.assertRegex(line, r"^M\S+ \S+h0L\S+ [0-9.]+M\S+ \S+h0$")

    def test_results_are_told_apart(self) -> None:
        more, other = changed(load__clients=1000), changed(target__name="ngircd")
        cases: list[Any] = [
            ([EXAMPLE], ["chat.py"]),
            ([EXAMPLE, other], ["chat.py", "ngircd"]),
            ([EXAMPLE, other, EXAMPLE, other], ["chat.py #1", "ngircd #1", "chat.py #2", "ngircd #2"]),
            ([EXAMPLE, more], ["chat.py, 200 clients", "chat.py, 1,000 clients"]),
            ([changed(target=None)], ["target"]),
        ]
        for results, expected in cases:
            with self.subTest(expected):
                page = self.page(*results)
                self.assertEqual(re.findall("<h2>(.*?)</h2>", page), expected)
        self.assertIn("<h1>loadtest: chat.py, ngircd</h1>", self.page(EXAMPLE, other, EXAMPLE))

    def test_the_verdict_and_four_figures_come_first(self) -> None:
        other = changed(latency__corrected={"p50": 7.0, "p99": None}, deliveries_per_s=9.0, verdict="UNKNOWN")
        begin = self.page(EXAMPLE, other, changed(target__name="ngircd")).partition("<figure>")[0].partition("</h1>")[2]
        self.assertRegex(begin, r"^\s*<p><strong>UNKNOWN</strong></p><h3>chat.py</h3>")
        figures = re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", begin)
        chat_py = [("p50", "7.00 ms"), ("p99", "-"), ("deliveries/s", "9"), ("lost", "0")]
        self.assertEqual(figures, [*chat_py, ("p50", "510 us"), ("p99", "2.20 ms"), ("deliveries/s", "198,801"),
                                   ("lost", "0")])  # fmt: skip

    def test_each_target_has_a_colour_however_many_rounds(self) -> None:
        page = self.page(*[EXAMPLE, changed(target__name="ngircd")] * 5)
        colours = [path.get("style") for path in figures(page)[0].iter("path") if path.get("class") == "line"]
        self.assertEqual(colours, ["stroke: var(--c0)", "stroke: var(--c1)"] * 5)

    def test_a_phone_shows_texts_as_they_are_and_needs_no_scrolling(self) -> None:
        page = self.page(EXAMPLE, sweep=SWEEP)
        for svg in figures(page):
            left, top, width, _ = map(float, (svg.get("viewBox") or "").split())
            self.assertEqual((left, top, width), (0, 0, 360))
            for text in svg.iter("text"):
                if text.get("text-anchor") == "end":
                    self.assertLess(7 * len(text.text or ""), float(text.get("x", 0)))
        self.assertIn("pre-wrap", page)
        self.assertNotIn("nowrap", page)

    def test_what_is_not_known_has_no_chart(self) -> None:
        nothing = changed(curve=[], over_time=[[0, None, None, None]])
        for result in (changed(curve=None, over_time=None), {}, nothing):
            page = self.page(result)
            self.assertEqual(figures(page), [])
            self.assertNotIn("<figure", page)

    def test_one_point_is_enough_for_a_chart(self) -> None:
        result = changed(curve=[[1.0, 0.0]], over_time=[[0, 1.0, 1.0, 1.0]])
        for svg in figures(self.page(result, sweep={"points": POINTS[:1], "exponent": None})):
            for line in lines_of(svg):
                self.assertRegex(line, r"^M[0-9.]+ [0-9.]+h0$")


class Recorded:
    """A run that never was: what its clients received is made here, in time that is made, too."""

    BEGIN = 1_700_000_000_000_000_000

    def __init__(self, case: unittest.TestCase, clients: int, senders: int, rate: float = 100.0, span_s: float = 0.4,
                 protocol: str = "irc", kind: type[loadtest.Run] = loadtest.Run) -> None:  # fmt: skip
        load = loadtest.Load(clients, senders, rate, span_s, 0.0, 64, 1, protocol, "#Chat", "", 1.0, False)
        target: Any = types.SimpleNamespace(servers=lambda: [("127.0.0.1", 1)], name="x", host="", port=1, others=())
        self.run = run = kind(load, target, lambda run: None)
        run.begin = run.turns.begin = self.BEGIN
        run.end = run.begin + int(span_s * 1e9)
        run.elapsed_s, run.joining_s, run.total = span_s, 1.0, int(rate * span_s)
        for number in range(run.total):
            sender = run.senders[number % senders]
            sender.numbers.append(number)
            sender.times.append(run.due(number))
            sender.after.append(-1)
        for client in run.clients:
            client.joined_s, client.settled = 1.0, 0
            client.sock.close()
            client.sock = mock.Mock()

    def lines(self, receiver: int) -> list[bytes]:
        """What a receiver must get."""
        wire, forms = self.run.wire, {"irc": ":c{}!u@h PRIVMSG #chat :{}\r", "plain": "c{}: {}"}
        forms["json"] = '{{"type": "chat", "user": "c{}", "text": "{}", "channel": "#chat"}}'
        numbers = [number for number in range(self.run.total) if number % wire.senders != receiver]
        lines = [forms[wire.dialect].format(n % wire.senders, wire.text(n)).encode() for n in numbers]
        return [chat.frame(chat.WS_TEXT, line) for line in lines] if wire.framed else lines

    def feed(self, receiver: int, lines: list[bytes], late_ns: int = 1_000_000) -> None:
        """A receiver gets lines, each so long after the message in it was due."""
        client = self.run.clients[receiver]
        for line in lines:
            client._store(line + b"\n" * (not self.run.wire.framed))
            number = client.order[-1]
            moment = self.run.due(number) + late_ns if number < self.run.total else self.run.end
            client.chunks.append(loadtest.Chunk(moment, len(client.order) - 1, len(client.order), True))

    def result(self, *args: str, again: Any = None) -> dict[str, Any]:
        parsed = loadtest.parser().parse_args(args)
        parsed.argv = []
        return loadtest.analyse(self.run, parsed, again=again)


def failing(result: dict[str, Any]) -> set[str]:
    return {check["check"] for check in result["checks"] if check["verdict"] == "FAIL"}


Cheat = Callable[[List[bytes]], List[bytes]]


def instead(change: Callable[[bytes], bytes | None]) -> Cheat:
    """One line is another, or none."""
    return lambda lines: list(filter(None, [*lines[:9], change(lines[9]), *lines[10:]]))


def beside(change: Callable[[bytes], bytes]) -> Cheat:
    """One line comes, and later another one."""
    return lambda lines: [*lines[:11], change(lines[9]), *lines[11:]]


def altered(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(line: bytes) -> bytes:
        assert old in line
        return line.replace(old, new, 1)

    return change


def says(line: bytes) -> Callable[[bytes], bytes]:
    return lambda _: line


CHEATS: dict[str, tuple[Cheat, set[str]]] = {  # what c3 gets, and the checks that fail
    "lost": (instead(lambda line: None), {"loss"}),
    "the last lost": (lambda lines: lines[:-1], {"loss"}),
    "doubled": (beside(bytes), {"duplicate"}),
    "swapped": (lambda lines: [*lines[:9], lines[10], lines[9], *lines[11:]], {"order"}),
    "delayed": (lambda lines: [*lines[:9], *lines[10:17], lines[9], *lines[17:]], {"order", "fifo"}),
    "a number altered": (instead(lambda line: re.sub(rb":M0", b":Mf", line)), {"loss", "corruption"}),
    "a mark altered": (instead(lambda line: re.sub(rb"-.", b"-x", line)), {"loss", "corruption"}),
    "a text altered": (instead(lambda line: line[:-3] + b"XX\r"), {"loss", "corruption"}),
    "a text cut": (instead(lambda line: line[:-3] + b"\r"), {"loss", "corruption"}),
    "a text with more": (instead(lambda line: line[:-1] + b" \r"), {"loss", "corruption"}),
    "two lines in one": (instead(lambda line: line + line), {"loss", "corruption"}),
    "another sender": (instead(altered(b":c1!", b":c0!")), {"loss", "corruption"}),
    "another user": (instead(altered(b"!u@", b"!v@")), {"loss", "corruption"}),
    "a sender who does not exist": (instead(altered(b":c1!", b":c01!")), {"loss", "corruption"}),
    "no sender": (instead(lambda line: line.partition(b" ")[2]), {"loss", "corruption"}),
    "another channel": (instead(altered(b"#chat", b"#chats")), {"loss", "corruption"}),
    "in a notice": (instead(altered(b"PRIVMSG", b"NOTICE")), {"loss", "corruption"}),
    "in a ping": (instead(lambda line: b"PING " + line), {"loss", "corruption"}),
    "in a ping without spaces": (beside(lambda line: b"PING :" + line.replace(b" ", b"")), {"corruption"}),
    "in a notice of the server": (instead(lambda line: b":s NOTICE c3 " + line), {"loss", "corruption"}),
    "bytes before it": (instead(lambda line: b"\x00" + line), {"loss", "corruption"}),
    "tags before it": (instead(lambda line: b"@a=b " + line), {"loss", "corruption"}),
    "doubled with two spaces": (beside(altered(b" #", b"  #")), {"corruption"}),
    "doubled in another case": (beside(altered(b"PRIVMSG", b"privmsg")), {"corruption"}),
    "doubled in another case of the channel": (beside(altered(b"#chat", b"#CHAT")), {"duplicate"}),
    "doubled as a private message": (beside(altered(b"#chat", b"c3")), {"corruption"}),
    "doubled as a notice": (beside(altered(b"PRIVMSG", b"NOTICE")), {"corruption"}),
    "doubled without a colon": (beside(altered(b" :M", b" M")), {"duplicate"}),
    "an invented notice": (beside(says(b":s NOTICE #chat :hello\r")), {"corruption"}),
    "an invented message": (beside(says(b":c1!u@h PRIVMSG #chat :hello\r")), {"corruption"}),
    "an invented kick": (beside(says(b":c1!u@h KICK #chat c0 :bye\r")), {"corruption"}),
    "an invented quit": (beside(says(b":c1!u@h QUIT :bye\r")), {"corruption"}),
    "an invented join": (beside(says(b":c7!u@h JOIN #chat\r")), {"corruption"}),
    "an invented numeric": (beside(says(b":s 404 c3 #chat :no\r")), {"corruption"}),
    "an empty line": (beside(says(b"\r")), {"corruption"}),
    "a line that does not end": (lambda lines: [*lines, b"x" * 70000], {"corruption"}),
    "a ping, which is no cheat": (beside(says(b"PING :s\r")), set()),
    "another line end, which is none": (lambda lines: [line.rstrip() for line in lines], set()),
    "nothing": (lambda lines: lines, set()),
}
PLAIN_CHEATS: dict[str, tuple[Cheat, set[str]]] = {
    "another sender": (instead(altered(b"c1:", b"c0:")), {"loss", "corruption"}),
    "the source of IRC": (instead(altered(b"c1:", b"c1!u@h:")), {"loss", "corruption"}),
    "as a private message": (instead(lambda line: b"[private] " + line), {"loss", "corruption"}),
    "as an action": (beside(lambda line: b"* " + line.replace(b":", b"", 1)), {"corruption"}),
    "an invented event": (beside(says(b"*** c1 left")), {"corruption"}),
    "nothing": (lambda lines: lines, set()),
}
JSON_CHEATS: dict[str, tuple[Cheat, set[str]]] = {
    "another type": (instead(altered(b'"chat"', b'"private"')), {"loss", "corruption"}),
    "another sender": (instead(altered(b'"c1"', b'"c0"')), {"loss", "corruption"}),
    "another channel": (instead(altered(b"#chat", b"#else")), {"loss", "corruption"}),
    "two texts": (instead(altered(b'"text"', b'"text": "x", "text"')), {"loss", "corruption"}),
    "a text that is none": (instead(altered(b'"user"', b'"id": {}, "user"')), {"loss", "corruption"}),
    "a key that nobody knows": (instead(altered(b'"user"', b'"to": "c3", "user"')), {"loss", "corruption"}),
    "bytes before it": (instead(lambda line: b" " + line), {"loss", "corruption"}),
    "escaped: the same again": (beside(altered(b'"M', b'"\\u004d')), {"duplicate"}),
    "an invented event": (beside(says(b'{"type": "system", "event": "leave", "user": "c1"}')), {"corruption"}),
    "what nobody can read": (beside(says(b"[" * 20000)), {"corruption"}),
    "nothing": (lambda lines: lines, set()),
}


def terse(item: bytes) -> bytes:
    """An object of JSON without spaces between its parts, so that it has less than 126 bytes."""
    return item.replace(b'": "', b'":"').replace(b'", "', b'","')


WS_CHEATS: dict[str, tuple[Cheat, set[str]]] = {
    "another sender": (instead(altered(b'"c1"', b'"c0"')), {"loss", "corruption"}),
    "binary": (instead(altered(b"\x81", b"\x82")), {"loss", "corruption"}),
    "reserved bits": (instead(altered(b"\x81", b"\xc1")), {"loss", "corruption"}),
    "never ended": (instead(altered(b"\x81", b"\x01")), {"loss", "corruption"}),
    "masked": (instead(lambda line: loadtest.masked_frame(0x81, line[4:])), {"loss", "corruption"}),
    "a long length": (instead(lambda line: b"\x81\x7f" + bytes(6) + line[2:]), {"loss", "corruption"}),
    "a longer length": (beside(lambda line: b"\x81\x7e\0" + chat.frame(1, terse(line[4:]))[1:]), {"corruption"}),
    "doubled in less": (beside(lambda line: chat.frame(1, terse(line[4:]))), {"duplicate"}),
    "two in one": (instead(lambda line: chat.frame(1, line[4:] + b"\n" + line[4:])), {"loss", "corruption"}),
    "in a ping": (instead(lambda line: chat.frame(9, line[4:][:125])), {"loss", "corruption"}),
    "in a ping that is too long": (instead(lambda line: chat.frame(9, line[4:])), {"loss", "corruption"}),
    "as a line": (instead(lambda line: line[4:] + b"\n"), {"loss", "corruption"}),
    "a pong": (beside(says(b"\x8a\0")), {"corruption"}),
    "a ping in a text": (beside(says(b"\x81\x02\x89\0")), {"corruption"}),
    "a ping, which is no cheat": (beside(says(b"\x89\x01\n")), set()),
    "nothing": (lambda lines: lines, set()),
}  # fmt: skip


def partly(record: Recorded) -> None:
    record.run.total += 1
    record.run.senders[0].numbers.append(40)
    record.run.senders[0].times.append(record.run.due(40))
    record.run.senders[0].after.append(-1)
    record.run.senders[0].sending = True


def trickling(record: Recorded) -> None:
    record.run.throttled = True
    record.run.clients[1].order.pop()


class Judged(unittest.TestCase):
    """What a recorded run is worth."""

    def test_what_arrives_is_kept_in_order_however_it_is_cut(self) -> None:
        for size in (1, 7, 5000):
            record = Recorded(self, 2, 1)
            client: Any = record.run.clients[1]
            lines = [b":s NOTICE * :x\r", *record.lines(1)[:5], b"PING :a\r", *record.lines(1)[:2]]
            data = b"".join(line + b"\n" for line in lines)
            for start in range(0, len(data), size):
                client._store(data[start : start + size])
            self.assertEqual([n for n in client.order if n < 99], [0, 1, 2, 3, 4, 0, 1])
            self.assertEqual(list(client.other_lines()), [(0, lines[0]), (6, b"PING :a\r")])
            self.assertEqual(client.sock.sendall.call_args_list, [mock.call(b"PONG :a\r\n")])
            client.sock.sendall.side_effect = OSError
            client._store(b"PING :b\r\nERROR :bye\r\n" + b"x" * 70_000)
            self.assertEqual([line[:9] for _, line in client.other_lines()][2:], [b"PING :b\r", b"ERROR :by", b"x" * 9])
            self.assertEqual(client._rest, b"")

    def test_frames_are_kept_in_order_however_they_are_cut_and_pings_are_answered(self) -> None:
        for size in (1, 7, 5000):
            record = Recorded(self, 2, 1, protocol="ws")
            client: Any = record.run.clients[1]
            lines = record.lines(1)
            data = b"".join([*lines[:3], b"\x89\x03a\nb", *lines[3:5]])
            for start in range(0, len(data), size):
                client._store(data[start : start + size])
            self.assertEqual([n for n in client.order if n < 99], [0, 1, 2, 3, 4])
            ((pong,), _), *others = client.sock.sendall.call_args_list
            self.assertEqual((others, pong[:2], loadtest.split_frames(pong)), ([], b"\x8a\x83", ([pong], b"")))
            server = chat.WebSocket(mock.Mock(), 4608, lambda *_: None)
            for number in range(20):  # with masks that differ
                self.assertEqual(
                    json.loads(server.feed(client.run.wire.line(number)))["text"], client.run.wire.text(number)
                )
            self.assertEqual(server.feed(pong), b"")
            self.assertFalse(server.closing)

    def recorded(self, protocol: str, cheat: Cheat) -> dict[str, Any]:
        record = Recorded(self, 4, 2, protocol=protocol)
        for receiver in range(4):
            lines = record.lines(receiver)
            record.feed(receiver, cheat(lines) if receiver == 3 else lines)
        return record.result()

    def test_no_cheat_passes(self) -> None:
        for protocol, cheats in (("irc", CHEATS), ("plain", PLAIN_CHEATS), ("json", JSON_CHEATS), ("ws", WS_CHEATS)):
            for name, (cheat, failed) in cheats.items():
                with self.subTest(name, protocol=protocol):
                    result = self.recorded(protocol, cheat)
                    self.assertEqual(failing(result), failed)
                    self.assertEqual(result["verdict"], "FAIL" if failed else "PASS")
                    self.assertEqual(result["deliveries"] < result["expected"], "loss" in failed)
                    for check in result["checks"]:
                        self.assertIn("c3" if check["verdict"] == "FAIL" else "", check["witness"])

    def test_no_two_runs_have_a_text_in_common(self) -> None:
        first, second = ({Recorded(self, 2, 1).run.wire.text(n) for n in range(100)} for _ in range(2))
        self.assertEqual(len(first | second), 200)

    def test_a_channel_is_compared_as_the_server_does(self) -> None:
        for mapping, same in (("ascii", False), ("rfc1459", True), ("rfc1459-strict", True), ("", False)):
            wire = loadtest.Wire("irc", "#c[\xdc]", 64, 1)
            wire.fold = loadtest.folding(mapping)
            for channel, found in (("#C[\xfc]", True), ("#c{\xfc}", same), ("#c", False)):
                line = f":c0!u@h PRIVMSG {channel} :{wire.text(7)}\r".encode()
                self.assertEqual(wire.number(line), 7 if found else -1, (mapping, channel))

    def test_the_last_words_of_a_server_are_told_with_what_lifts_its_limit(self) -> None:
        cases = (
            ("irc", b"ERROR :Closing link: Excess Flood\r", "Excess Flood .perhaps its flood control"),
            ("irc", b":irc.test ERROR :Too many connections\r", "^1 disconnected: Too many .*MaxConnectionsIP"),
            ("plain", b"*** Too many clients here", "^1 disconnected: Too many clients here .*localmax"),
            ("json", b'{"type": "error", "code": "x", "text": "RecvQ"}', "^1 disconnected: RecvQ .*recvq="),
            ("irc", b"", "^1 disconnected: Connection reset$"),
            (
                "ws",
                chat.frame(1, b'{"text": "x"}') + chat.close_frame(1008, "Flooding"),
                "^1 disconnected: Flooding .*flood",
            ),
        )
        for protocol, words, told in cases:
            record = Recorded(self, 4, 2, protocol=protocol)
            for receiver in range(4):
                lines = record.lines(receiver)
                record.feed(receiver, [*lines[:30], *[words] * bool(words)] if receiver == 3 else lines)
            record.run.clients[3].failure = "Connection reset"
            result = record.result()
            with self.subTest(words):
                self.assertRegex("\n".join(result["failures"]), told)
                self.assertEqual((failing(result), result["verdict"], result["disconnected"]), ({"loss"}, "FAIL", 1))

    def test_who_is_dropped_because_we_read_too_slowly_is_no_loss_of_the_server(self) -> None:
        for words, slow in (
            (b"ERROR :Max SendQ exceeded\r", False),
            (b"ERROR :Reads too slowly\r", False),
            (b"", True),
        ):
            record = Recorded(self, 4, 2)
            for receiver in range(4):
                lines = record.lines(receiver)
                quit_notice = [b":c3!u@h QUIT :SendQ\r"] if receiver < 3 else []
                record.feed(
                    receiver, [*lines[:30], *[words] * bool(words)] if receiver == 3 else [*lines, *quit_notice]
                )
            client = record.run.clients[3]
            client.failure, client.slow = "Connection reset", slow
            result = record.result()
            with self.subTest(words):
                self.assertEqual((failing(result), result["verdict"]), (set(), "UNKNOWN"))
                self.assertIn("the load tester was too slow for this load, not the server", result["failures"][1])
                self.assertIn("receivers read too slowly, so they were dropped", result["generator"]["why"])
                self.assertIsNone(result["latency"]["corrected"]["max"])

    def test_verdicts(self) -> None:
        def interrupted(record: Recorded) -> None:
            record.run.interrupted = True

        def unsent(record: Recorded) -> None:
            record.run.total += 1

        def disconnected(record: Recorded) -> None:
            record.run.clients[1].failure = "Connection reset"

        lost = lambda record: record.feed(0, [])  # noqa: E731
        over = ("--fail-if", "p50>0us")
        cases: tuple[tuple[Any, tuple[str, ...], str, int], ...] = (
            (None, (), "PASS", 0), (None, over, "FAIL", 99), (lost, over, "FAIL", 1),
            (interrupted, (), "INTERRUPTED", 130), (interrupted, over, "INTERRUPTED", 130), (unsent, (), "UNKNOWN", 1),
            (disconnected, (), "UNKNOWN", 1), (trickling, (), "UNKNOWN", 1), (partly, (), "UNKNOWN", 1),
            (unsent, over, "FAIL", 99),
        )  # fmt: skip
        for change, args, verdict, status in cases:
            record = Recorded(self, 3, 1)
            for receiver in range(1 if change is lost else 0, 3):
                record.feed(receiver, record.lines(receiver) if change is not lost or receiver > 1 else [])
            if change:
                change(record)
            result = record.result(*args)
            given: Any = types.SimpleNamespace(interrupted=change is interrupted, strict=False)
            with self.subTest(change=change, args=args):
                self.assertEqual(result["verdict"], verdict)
                self.assertEqual(loadtest.exit_code({"results": [result], "faults": None}, given), status)
                if change is unsent:
                    self.assertRegex(loadtest.text_report(result), r"\n\w+ .*, 1 of 41 messages never sent[^\n]*$")

    def test_a_server_that_throttles_is_named(self) -> None:
        record = Recorded(self, 2, 1)
        record.feed(0, [])
        record.feed(1, record.lines(1))
        record.run.elapsed_s = 1.0  # 40 messages in 0.4 s were asked for
        result = record.result()
        self.assertIn("PASS  40 of 40 deliveries, throttled to 40 messages/s, ", loadtest.text_report(result))
        self.assertRegex(result["failures"][0], r"^only 40 of 100 messages/s .*ngircd MaxPenaltyTime = 0")

    def test_nothing_comes_before_it_was_sent(self) -> None:
        record = Recorded(self, 4, 2)
        for receiver in range(4):
            record.feed(receiver, record.lines(receiver), -8_700_000 if receiver == 3 else 0)
        result = record.result()
        self.assertEqual((failing(result), result["verdict"]), ({"causality"}, "FAIL"))
        self.assertEqual(result["checks"][-1]["witness"], "c3 got 0 (from s0) 8.700 ms before it was sent")
        self.assertEqual(result["checks"][-1]["count"], 40)


class Paced(unittest.TestCase):
    """When clients send, and since when they are judged."""

    def test_without_a_schedule_no_receiver_gets_far_behind(self) -> None:
        record = Recorded(self, 4, 1, rate=0.0)
        run, sender, clients = record.run, record.run.senders[0], record.run.clients
        clients[3].failure = "gone"

        def send(least: int) -> int:
            """Lets a sender run away, until it had to wait, or has sent so many; how many it has sent in all."""
            run.end, run.gate.held = loadtest.now_ns() + 30 * 10**9, False
            with mock.patch.object(time, "sleep", lambda _: setattr(run, "stopping", True)):
                while not run.stopping and len(sender.numbers) < least:
                    run.gate.admit()
                    sender.numbers.extend([0] * (not run.stopping))
            self.assertEqual((run.gate.held, run.stopping), (len(sender.numbers) < least, run.gate.held))
            run.stopping = False
            return len(sender.numbers)

        self.assertEqual(send(9_999), loadtest.BEHIND)
        clients[1].order.extend(range(3000))
        self.assertEqual(send(9_999), loadtest.BEHIND)
        clients[2].order.extend(range(2000))
        self.assertEqual(send(9_999), loadtest.BEHIND + 2000)

    def test_a_return_is_judged_for_those_who_were_in(self) -> None:
        for lost, late_ms, steady_s, verdict in ((9, 1, 0.195, "PASS"), (9, 150, 0.2, "PASS"), (9, 900, None, "PASS"),
                                                 (21, 1, 0.195, "FAIL"), (None, 1, None, "UNKNOWN")):  # fmt: skip
            records = [Recorded(self, 3, 1), Recorded(self, 3, 1, kind=loadtest.Return)]
            for record, slow in zip(records, (2, late_ms)):
                for receiver in range(3):
                    for place, line in enumerate(record.lines(receiver)):  # what was due until 0.2 s may be slow
                        if record is records[0] or receiver < 2 or place > 19 and place != lost:
                            record.feed(receiver, [line], (slow if place < 20 or slow > 500 else 1) * 1_000_000)
            run: Any = records[1].run
            run.clients[2].joined_ns = run.begin + 195_000_000
            if lost is None:
                run.clients[0].joined_s, run.failure = 0.0, "1 of 3 could not join"
            result = records[0].result("--fail-if", "lost>0", again=run)
            with self.subTest(lost=lost, late_ms=late_ms):
                self.assertEqual(result["verdict"], verdict)
                found = result["reconnect"]
                self.assertEqual(found["expected"] - found["deliveries"], lost == 21)
                self.assertEqual([over["exceeded"] for over in result["thresholds"]], [lost == 21])
                found = records[0].result("--check", "order", again=run)["reconnect"]
                self.assertIsNone(found["deliveries"])
                self.assertEqual((found["expected"], found["steady_s"]), (60, steady_s))
                self.assertEqual(found["all_in_s"], None if lost is None else 0.195)
                self.assertEqual("1 of 3 could not join" in result["failures"], lost is None)
                text = " ".join(loadtest.text_report(result).split())
                self.assertEqual("delivery steady after" in text, steady_s is not None)
                self.assertEqual("delivery still slower than before after" in text, late_ms == 900)
                if lost == 21:
                    self.assertIn(
                        "FAIL: loss, 1 times\n             after the return, c2 never got 21 (from s0); c1 did",
                        loadtest.text_report(result).replace("  after", "after"),
                    )

    def test_who_comes_back_tries_again_and_sends_what_is_due_since_then(self) -> None:
        run = Recorded(self, 2, 1, kind=loadtest.Return).run
        client: Any = run.clients[0]
        sender = loadtest.Sender(run, client)
        client.joined_s, refusals = 0.0, [OSError("name taken"), OSError("too busy")]

        def connect() -> None:
            if refusals:
                raise refusals.pop()
            client.joined_s, client.joined_ns = 1.0, loadtest.now_ns()

        with mock.patch.object(client, "_connect", connect):
            client._come()
        client.sock.close()
        client.sock = mock.Mock()
        run.begin, run.end = client.joined_ns - 195_000_000, client.joined_ns + 10**10
        sender.live()
        self.assertEqual(list(sender.numbers), list(range(20, 40)))


class Hours:
    """Stands for the module `time`: it passes when somebody sleeps, a little longer than asked."""

    late_s = 0.0002

    def __init__(self, now: int, rng: random.Random) -> None:
        self.now, self.rng = now, rng

    def time_ns(self) -> int:
        return self.now

    def perf_counter_ns(self) -> int:
        return self.now - loadtest.CLOCK_OFFSET

    def sleep(self, seconds: float) -> None:
        self.now += int((seconds + self.rng.random() * self.late_s) * 1e9)


def slow_sender(receiver: int, number: int, due_s: float) -> float:
    return 1.0 if number % 20 == 7 else 0.002


def slow_receivers(receiver: int, number: int, due_s: float) -> float:
    return 0.3 if receiver in (2, 3) else 0.002


def bursts(receiver: int, number: int, due_s: float) -> float:
    """Once in a cycle of turns all stands still, for some receivers longer."""
    return 0.7 + receiver % 5 // 4 * 0.2 - due_s % 0.625 if due_s % 0.625 > 0.5 else 0.01


def now_and_then(receiver: int, number: int, due_s: float) -> float:
    return (number * 7 + receiver * 13) % 50 * 0.01 + 0.001


DELAYS: dict[Any, int] = {  # seconds, and of how many receivers
    slow_sender: 21, slow_receivers: 20, bursts: 10, now_and_then: 10,
}  # fmt: skip


class Sampling(unittest.TestCase):
    """What receivers in turns measure is what all would have: with known delays, over many runs, in made up time."""

    def simulate(self, seed: int, delay: Callable[[int, int, float], float], groups: int = 5) -> Any:
        """(the sample, and all true delays in ms) of one run."""
        rng, clients, rate, span = random.Random(seed), DELAYS.get(delay, 10), 80.0, 2.5
        senders = clients - 1
        run, true = Recorded(self, clients, senders, rate, span).run, {}
        run.turns = loadtest.Turns(clients, loadtest.WAKEUPS * groups, int(span * 1e9), seed)
        run.turns.begin = run.begin
        self.assertEqual(run.turns.groups, groups)
        for client in run.clients:
            arrivals = []
            for number in range(run.total):
                if number % senders != client.number:
                    seconds = delay(client.number, number, number / rate) * rng.uniform(1.0, 1.1)
                    true[client.number, number] = 1000 * seconds
                    arrivals.append((run.due(number) + int(seconds * 1e9), number))
            self.receive(run, client, sorted(arrivals), rng)
        sent, times = loadtest.collect(run)
        sample = loadtest.Sample(run.turns, sent, times, times)
        for client in run.clients:
            self.assertEqual(sample.add(client.number, client.order, client.chunks), [])
        return sample, true

    def receive(self, run: Any, client: Any, arrivals: list[tuple[int, int]], rng: random.Random) -> None:
        """The thread of a client, whose socket and clock are those here."""
        hours, left = Hours(run.begin - 100_000_000, rng), collections.deque(arrivals)
        run.stopping = False
        if run.turns.groups > 1:
            client.watch = loadtest.Watch(run.turns.of(client.number), run.due_between, client.order)

        def chunk(wait: bool) -> tuple[bytes | None, int]:
            if wait and left and left[0][0] > hours.now:
                hours.now = left[0][0] + rng.randrange(100_000)
            here = []
            while left and left[0][0] <= hours.now:
                here.append(left.popleft())
            run.stopping = not left and not here
            moment = here[-1][0] if here else 0
            return bytes(len(here)) or None, moment if here else 0

        def store(data: bytes) -> None:
            start = len(client.order)
            client.order.extend(number for _, number in arrivals[start : start + len(data)])

        with mock.patch.object(loadtest, "time", hours), mock.patch.multiple(client, _chunk=chunk, _store=store):
            client._receive()

    def reported(self, sample: Any, run: Any) -> Any:
        return loadtest.Latencies(run, sample).as_dict()["latency"]["corrected"]

    def test_one_slow_sender_of_twenty_is_in_the_p99_of_every_run(self) -> None:
        for seed in range(5):
            sample, _ = self.simulate(seed, slow_sender, 7)
            found = self.reported(sample, Recorded(self, 21, 20).run)
            self.assertEqual(found["samples"], len(sample.late))
            self.assertGreaterEqual(found["p99"], 1000.0)

    def test_what_comes_too_late_to_wait_for_is_not_timed_better(self) -> None:
        def delay(receiver: int, number: int, due_s: float) -> float:
            return 9.0 if number % 10 == 7 else 0.002

        sample, true = self.simulate(1, delay)
        late = sorted(ns / 1e6 for _, _, ns in sample.late if ns > 5e9)
        self.assertEqual(sample.missing, [])
        self.assertGreater(sample.rough, len(late) // 2)
        self.assertAlmostEqual(len(late) / len(sample.late), 0.1, delta=0.03)
        self.assertGreaterEqual(late[0], 9000.0)
        self.assertLess(late[-1], max(true.values()) + 60)

    def test_a_receiver_that_wakes_too_late_says_so(self) -> None:
        with mock.patch.object(Hours, "late_s", 0.1):
            sample, true = self.simulate(1, now_and_then)
        errors = [ns / 1e6 - true[client, number] for client, number, ns in sample.late]
        self.assertGreaterEqual(min(errors), -0.001)
        self.assertIn(sum(error > 0.2 for error in errors), range(1, sample.rough + 1))

    def test_what_never_came_is_slower_than_all(self) -> None:
        for lacking, known in ((0, 5), (1, 4), (9, 3), (15, 2), (150, 1), (603, 0)):
            run = Recorded(self, 4, 1).run
            times = [run.begin + n * 1_000_000 for n in range(400)]
            sample = loadtest.Sample(run.turns, Sent(array("i", [0] * 400), array("i", [-1] * 400)), times, times)
            for receiver in range(4):  # 0 is the sender
                order = array("I", range(400 - (lacking + receiver - 1) // 3 if receiver else 400))
                sample.add(receiver, order, [loadtest.Chunk(times[n] + n, n, n + 1, True) for n in order])
            self.assertEqual(len(sample.missing), lacking)
            values = [value for value in self.reported(sample, run).values() if value is not None]
            self.assertEqual(len(values) - 1, known, lacking)

    def test_turns_measure_what_all_would_have(self) -> None:
        for delay in DELAYS:
            with self.subTest(delay.__name__):
                shares: dict[float, list[float]] = {0.5: [], 0.9: [], 0.99: []}
                for seed in range(8):
                    sample, true = self.simulate(seed, delay)
                    late = sorted(ns / 1e6 for _, _, ns in sample.late)
                    self.assertEqual((sample.missing, sample.rough), ([], 0))
                    self.assertAlmostEqual(len(late) / len(true), 0.2, delta=0.02)
                    ordered = sorted(true.values())
                    for quantile, found in shares.items():
                        bound = ordered[int(quantile * len(ordered))]
                        found.append(sum(value <= bound for value in late) / len(late))
                for quantile, found in shares.items():
                    spread = statistics.stdev(found) / len(found) ** 0.5
                    self.assertAlmostEqual(statistics.mean(found), quantile, delta=4 * spread + 0.006)


class Proxy:
    """Passes connections on to a server, but spoils what one client of a load test receives, or delays what it says."""

    AT = 20  # the message that is spoilt
    LATE_S = 0.3

    def __init__(self, port: int, mutate: str, victim: str) -> None:
        self.port_behind, self.mutate, self.victim = port, mutate, f"NICK {victim}\r\n".encode()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.seen = 0
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self.listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self.port_behind))
                first = client.recv(4096)
                server.sendall(first)
                spoil = self.spoil if self.victim in first and self.mutate != "late" else None
                delay = self.delay(server) if self.victim in first and self.mutate == "late" else None
                threading.Thread(target=self.pump, args=(client, server, delay), daemon=True).start()
                threading.Thread(target=self.pump, args=(server, client, spoil), daemon=True).start()

    def pump(self, source: socket.socket, sink: socket.socket, spoil: Callable[[bytes], list[bytes]] | None) -> None:
        lines, data = chat.LineBuffer(1 << 20), b"\n"
        with contextlib.suppress(OSError), source, sink:
            while data:
                data = source.recv(65536)
                for line in lines.feed(data):
                    for out in spoil(line or b"") if spoil else [line or b""]:
                        sink.sendall(out + b"\r\n")
            sink.shutdown(socket.SHUT_RDWR)

    def delay(self, server: socket.socket) -> Callable[[bytes], list[bytes]]:
        def later(line: bytes) -> list[bytes]:
            if b"PRIVMSG" not in line:
                return [line]
            threading.Timer(self.LATE_S, server.sendall, [line + b"\r\n"]).start()
            return []

        return later

    def spoil(self, line: bytes) -> list[bytes]:
        self.seen += b" PRIVMSG " in line
        if b" PRIVMSG " not in line or self.seen != self.AT:
            return [line]
        return [line, line] if self.mutate == "double" else []


class LoadTestCase(ProgramCase):
    """loadtest.py as a program."""

    QUICK = ("-n", "8", "-S", "4", "-r", "200", "-d", "1", "-w", "0.2")
    FEW = ("-n", "4", "-S", "2", "-r", "100", "-d", "0.3", "-w", "0.1")

    def setUp(self) -> None:
        self.folder = temporary_folder(self)

    def end(self, program: subprocess.Popen[str]) -> None:
        """When a test was interrupted: lets a load test end the server that it started, which may have begun."""
        for seconds in (3, 15) if "loadtest.py" in str(program.args) and program.poll() is None else ():
            with contextlib.suppress(subprocess.TimeoutExpired, ValueError):  # read to its end already
                program.communicate(timeout=seconds)
            if program.poll() is None and seconds == 3:
                program.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
        super().end(program)

    def loadtest(self, *args: str) -> subprocess.Popen[str]:
        return self.start(*args, file="loadtest.py")

    def whole(self, found: dict[str, Any]) -> None:
        """All that a QUICK run sent has arrived: 240 messages, each at 7; or fewer, on a machine that is too busy."""
        self.assertEqual((found["deliveries"], found["expected"] % 7), (found["expected"], 0))
        self.assertIn(found["expected"], range(1680 // 2, 1680 + 1))

    def done(self, program: subprocess.Popen[str]) -> tuple[int, str, str]:
        out, err = program.communicate(timeout=3 * PATIENCE)
        return program.returncode, out, err

    def passes(self, program: subprocess.Popen[str], status: int = 0) -> str:
        """What it reports, without a complaint."""
        found, out, err = self.done(program)
        busy = r"(?m)^loadtest\.py: only .* messages/s were passed on: .*\n"  # what a busy machine is taken for
        self.assertEqual((found, re.sub(busy, "", err)), (status, ""), out)
        return out

    def document(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


class LoadTest(LoadTestCase):
    """Against our own server, and a spoiling proxy."""

    def test_clean_runs_and_returns_pass_in_every_protocol(self) -> None:
        programs = {}
        for protocol in ("irc", "plain", "json", "ws"):
            files = ("--json", f"{self.folder}/{protocol}.json", "--html", f"{self.folder}/{protocol}.html")
            programs[protocol] = self.loadtest(*self.QUICK, "--proto", protocol, "--reconnect", *files)
        for protocol, program in programs.items():
            with self.subTest(protocol):
                out = self.passes(program)
                self.assertRegex(out, r"\nPASS  ([\d,]+) of \1 deliveries, once, unchanged, in one order\n$")
                found = self.document(f"{protocol}.json")["results"][0]
                self.whole(found)
                self.assertGreater(found["latency"]["corrected"]["samples"], found["expected"] * 3 // 4)
                self.assertGreaterEqual(found["latency"]["corrected"]["p50"], 0)
                parts = [found[key] for key in ("join", "reconnect", "latency", "fairness", "generator", "server")]
                keys = {key for part in [found, *parts, found["checks"][0]] for key in part or {}}
                self.assertLessEqual(keys, set(re.findall(r"\w+(?:\.\d)?", loadtest.JSON_HELP)))
                again = found["reconnect"]
                self.assertEqual((again["deliveries"], again["expected"] > 0), (again["expected"], True))
                self.assertIn("\nreconnect    all in again ", out)
                self.assertIn("<svg", (self.folder / f"{protocol}.html").read_text(encoding="utf-8"))

    def test_another_chat_is_compared(self) -> None:
        other = str(shutil.copy(chat.__file__, self.folder / "other.py"))
        files = (
            "--json",
            f"{self.folder}/json",
            "--hdr",
            f"{self.folder}/hdr",
            "--openmetrics",
            f"{self.folder}/metrics",
        )
        out = self.passes(self.loadtest(*self.FEW, "--rounds", "1", "--versus", other, *files))
        self.assertRegex(out, r"\nratio: chat\.py /(?s:.*)other\.py, medians of 1\s+rounds;\s+noise: ")
        self.assertGreater(self.document("json")["versus"]["ratios"]["p50"], 0)
        for name in ("hdr", "hdr.2", "metrics"):
            self.assertGreater(len((self.folder / name).read_text(encoding="utf-8").splitlines()), 5)

    def test_what_was_said_before_is_not_counted(self) -> None:
        programs = []
        for protocol in ("irc", "plain", "json", "ws"):
            _, port = self.server()
            peer = joined(self, port, "c1\n", "joined")
            for number in range(10):
                peer.send(loadtest.Wire("plain", "#chat", 64, 1).line(number).decode())
            peer.send("/quit\n")
            peer.rest()
            programs.append(self.loadtest(*self.FEW, "--port", str(port), "--proto", protocol))
        for program in programs:
            self.passes(program)

    def test_damage_on_the_way_is_caught(self) -> None:
        proxy = Proxy(self.server()[1], "double", "c7")
        self.addCleanup(proxy.listener.close)
        status, out, _ = self.done(self.loadtest(*self.QUICK, "--port", str(proxy.port)))
        self.assertEqual(status, 1, out)
        self.assertRegex(out, r"FAIL: duplicate, 1 times\n +c7 got ")

    def test_one_slow_sender_is_in_the_percentiles_of_receivers_that_take_turns(self) -> None:
        proxy = Proxy(self.server()[1], "late", "c0")
        self.addCleanup(proxy.listener.close)
        files = ("--port", str(proxy.port), "--json", f"{self.folder}/json", "--fail-if", "p90>200ms")
        checks = ("--check", "loss,corruption")  # what is delayed by timers may lose its order
        with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(loadtest, "WAKEUPS", 400):
            self.assertEqual(loadtest.main(["-q", *self.QUICK, *files, *checks]), 99)
        found = self.document("json")["results"][0]
        self.assertIn("of one receiver in 4 at a time", found["clock"])
        self.assertGreater(found["latency"]["corrected"]["p90"], 1000 * Proxy.LATE_S)
        self.assertEqual(found["timed"]["missing"], 0)

    def test_thresholds_and_errors(self) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = str(unused.getsockname()[1])
            several = ("--target", "a:1", "--target", "b:2", "--proto", "json")
            cases = (
                ((*self.QUICK, "--fail-if", "p50>0us"), 99, "", "EXCEEDED"),
                ((*self.QUICK, "--fail-if", "p50>10s", "--check", "loss,fifo"), 0, "", "skipped: duplicate"),
                (("--port", port), 2, "could not join: Connection refused", ""),
                (("--faults", "speed"), 2, "known are stalled,", ""),
                (("--fail-if", "speed>3"), 2, "unknown measure 'speed'", ""),
                (("-n", "1"), 2, "'1' is not a whole number from 2", ""),
                (("--host", "192.0.2.1"), 2, "--host needs --port", ""),
                (("--versus", "foo"), 2, "'foo' is neither a file nor HOST:PORT", ""),
                (several, 2, "several --target, and --faults, need --proto irc", ""),
                (("-d", "nan"), 2, "'nan' is not a number from 0 up", ""),
                (("--json", "/no/such/file"), 2, "No such file", ""),
                (("--server-command", '"'), 2, "No closing quotation", ""),
                (("--server-command", "/no/such/server"), 2, "cannot start /no/such/server", ""),
                (("--server-command", f"{sys.executable} -c 0"), 2, "does not listen", ""),
            )
            programs = [self.loadtest(*args) for args, *_ in cases]
            for program, (args, code, complaint, report) in zip(programs, cases):
                with self.subTest(args):
                    status, out, err = self.done(program)
                    self.assertEqual(status, code, err + out)
                    self.assertIn(complaint, err)
                    self.assertIn(report, out)

    def test_where_reads_cannot_but_wait_and_the_clock_ticks_slowly(self) -> None:
        """As on Windows."""
        there = mock.patch.multiple(loadtest, DONTWAIT=0, KERNEL_CLOCK=False)
        slow = mock.patch.object(time, "time_ns", lambda: int(time.time() * 64) * 15_625_000)
        with there, slow, contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(loadtest.main([*self.FEW, "-q", "--json", f"{self.folder}/json"]), 0)
        found = self.document("json")["results"][0]
        self.assertGreater(found["latency"]["corrected"]["samples"], found["deliveries"] // 2)
        self.assertLess(found["timed"]["rough"], found["latency"]["corrected"]["samples"])
        self.assertGreater(found["latency"]["uncorrected"]["p50"] % 15.625, 0)

    def test_a_command_is_split_as_the_platform_does(self) -> None:
        windows, odd = r"""C:\py\python.exe "C:\my chats\chat.py" -m it's #x""", ["a b", "c", "--x={port}"]
        for system, words in (
            ("win32", [r"C:\py\python.exe", r"C:\my chats\chat.py", "-m", "it's", "#x"]),
            ("linux", None),
        ):
            with mock.patch.object(sys, "platform", system):
                self.assertEqual(loadtest.split(windows if words else r"C:\\a '#b c'"), words or [r"C:\a", "#b c"])
                self.assertEqual(loadtest.split(loadtest.join(odd)), odd)

    @mock.patch.object(loadtest, "OVERTIME_S", 0.1)
    def test_what_cannot_be_sent_is_said(self) -> None:
        impossible = ("-n", "2", "-S", "1", "-r", "1000000", "-d", "0.2", "-w", "0", "-s", "400", "-q")
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(loadtest.main([*impossible]), 1)
        self.assertRegex(
            out.getvalue(), r"\nUNKNOWN  [\d,]+ of [\d,]+ deliveries, [\d,]+ of 200,000 messages never sent"
        )

    def test_all_addresses_of_a_name_are_tried(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            good, bad = listener.getsockname(), unused.getsockname()
            found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in (bad, good)]
            with mock.patch.object(socket, "getaddrinfo", return_value=found):
                self.assertEqual(loadtest.resolve("localhost", 1), (socket.AF_INET, good))

    def test_what_cannot_be_a_host_is_one_line(self) -> None:
        for host in ("a" * 70, "a..b", ".", "a\0b", "a\nb", "a b", "\udcff", "256.1.1.1"):
            for args in (["--host", host, "--port", "1"], ["--target", f"{host}:1"]):
                with self.subTest(args), contextlib.redirect_stderr(io.StringIO()) as err:
                    self.assertEqual(loadtest.main([*args]), 2)
                    self.assertRegex(err.getvalue(), r"^loadtest\.py: [^\n]+\n$")

    @unittest.skipUnless(os.name == "posix", "needs process groups")
    def test_nothing_of_a_server_is_left_when_its_wrapper_ends_first(self) -> None:
        child = "import os, signal, socket, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        child += "s = socket.create_server(('127.0.0.1', int(sys.argv[1])));"
        child += "s.accept(); s.accept()[0].sendall(b'%d' % os.getpid()); time.sleep(60)"
        wrapper = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, *sys.argv[1:]])"
        target = loadtest.Target("", 0, [sys.executable, "-c", wrapper, "{port}"])
        self.addCleanup(target.stop)
        with socket.create_connection((target.host, target.port)) as sock:
            pid = int(sock.recv(99))
        with mock.patch.object(loadtest, "STOP_S", 0.3):
            target.stop()
        self.eventually(lambda: self.is_dead(pid), "the server lives")

    @staticmethod
    def is_dead(pid: int) -> bool:
        try:
            os.kill(pid, 0)
            state = pathlib.Path(f"/proc/{pid}/stat")  # nobody may have reaped it
            return state.exists() and state.read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
        except ProcessLookupError:
            return True

    @unittest.skipUnless(sys.platform == "linux", "needs /proc")
    def test_interrupted_it_reports_and_leaves_no_server_behind(self) -> None:
        program = self.loadtest(*self.QUICK, "-d", "30", "-q")
        threads = pathlib.Path(f"/proc/{program.pid}/task")
        children = threads / str(program.pid) / "children"
        self.eventually(lambda: children.read_text(encoding="ascii"), "no server is started")
        server = children.read_text(encoding="ascii").split()[0]
        self.eventually(lambda: len(list(threads.iterdir())) >= 13, "not main, 8 clients and 4 senders")
        time.sleep(0.5)  # let something be sent
        program.send_signal(signal.SIGINT)
        self.assertRegex(self.passes(program, 130), r"skipped: loss(?s:.*)\nINTERRUPTED  ")
        self.assertFalse(os.path.exists(f"/proc/{server}"))


class Witness:
    """An IRC server that lets everybody in, and keeps what it is sent: the beginning and the end, if that is much."""

    KEPT = 4_000_000  # bytes of the beginning

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.seen = b""
        self.more = threading.Condition()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while self.listener.fileno() >= 0:
            with contextlib.suppress(OSError):  # closed; or, on Windows, who came has gone already
                sock = self.listener.accept()[0]
                threading.Thread(target=self.read, args=(sock,), daemon=True).start()

    def read(self, sock: socket.socket) -> None:
        data = b"\n"
        with sock:
            while data:
                with self.more:
                    self.seen = self.seen[: self.KEPT] + (self.seen[self.KEPT :] + data)[-self.KEPT :]
                    self.more.notify_all()
                try:
                    if b"USER " in data:
                        sock.sendall(b":s 001 d :hi\r\n")
                    if b"Upgrade: websocket" in data:
                        sock.sendall(b'HTTP/1.1 101 x\r\n\r\n"join"')
                    if b"PING x" in data:
                        sock.sendall(b":s PONG s :x\r\n")
                    data = sock.recv(1 << 20)
                except ConnectionError:
                    data = b"" if not data else b"RESET" * (data != b"RESET")

    def sees(self, pattern: bytes) -> bool:
        with self.more:
            return self.more.wait_for(lambda: re.search(pattern, self.seen) is not None, PATIENCE)


class Disturbers(LoadTestCase):
    """Faults: what each of them does, and what a run tells of it."""

    UPGRADE = rb"^\nGET / HTTP/1\.1\r\nHost: (?:.+\r\n)+Sec-WebSocket-Key: .+\r\n"
    FRAMED = UPGRADE + rb"\r\n\x81[\xc0-\xfd](?s:.{68,125}?)"
    JOINED = rb"PASS secret\r\nNICK d0x1\r\nUSER d0x1 0 \* :d0x1\r\nJOIN #load\r\n"

    def setUp(self) -> None:
        super().setUp()
        self.witness = Witness()
        self.addCleanup(self.witness.listener.close)
        self.port = self.witness.listener.getsockname()[1]

    def load(self) -> loadtest.Load:
        return loadtest.Load(2, 1, 1.0, 1.0, 0.0, 64, 1, "irc", "#load", "secret", 1.0, False)

    @contextlib.contextmanager
    def disturber(self, port: int, act: Any) -> Iterator[loadtest.Peer]:
        """Somebody who does something, until the end."""
        over = threading.Event()
        peer = loadtest.Peer(self.load(), (socket.AF_INET, ("127.0.0.1", port)), over, 0)
        thread = threading.Thread(target=peer.live, args=(act,))
        thread.start()
        try:
            yield peer
        finally:
            over.set()
            thread.join(PATIENCE)
        self.assertFalse(thread.is_alive())

    def test_each_does_what_it_says(self) -> None:
        registered, joined = self.JOINED[: self.JOINED.index(b"JOIN")], self.JOINED
        wanted = {
            "stalled": joined,
            "trickle": joined + rb"PI",
            "silent": rb"^\n$",
            "half-tls": rb"^\n\x16\x03\x01$",
            "flood": registered + rb"(PRIVMSG c0 :x{64}\r\nPING x\r\n){40}",
            "notices": joined + rb"(NOTICE #load :x{64}\r\n){40}",
            "endless": registered + rb"x{1000000}\r\nx",
            "blank": registered + rb"(\r\n){9000}",
            "garbage": rb"(?s)^\n.*[\x80-\xff].*",
            "resets": rb"JOIN #load\r\nPING x\r\nPRIVMSG #load :half of a liRESET",
            "vanish": rb"(?s)" + joined + rb".*RESET",
            "storm": rb"RESET",
            "joins": joined + rb"(PART #load\r\nJOIN #load\r\n){40}",
            "rooms": registered + rb"JOIN #d0-0\r\nJOIN #d0-1\r\n",
            "nicks": joined + rb"NICK d0n0\r\nNICK d0n1\r\n",
            "claims": registered + rb"(NICK c0\r\nNICK c1\r\nNICK c2\r\n){40}",
            "questions": joined + rb"CHATHISTORY LATEST #load \* 100\r\nWHO #load\r\nLIST\r\nNAMES #load\r\n",
            "unread": joined + rb"CHATHISTORY LATEST #load \* 100\r\nWHO #load\r\nLIST\r\nNAMES #load\r\n",
            "guesses": rb"PASS guess1\r\nNICK d0x1\r\n",
            "masks": registered + rb"JOIN #d0\r\nMODE #d0 \+bbbb (\*\?{60}0[0-3]!\*@\*[ \r]){4}\nJOIN",
            "targets": registered + rb"JOIN #d0-0\r\nPRIVMSG #d0-0 :x\r\nCHATHISTORY TARGETS time(.+) time(.+) 100\r\n",
            "who": joined + rb"(WHO #load\r\n){40}",
            "moves": rb'"user": "d0x1", "channel": "#load", "password": "secret"}\r\n(.*"#load,#z0,#LOAD,.*\r\n){40}',
            "slow-headers": self.UPGRADE + rb"X",
            "endless-headers": self.UPGRADE + rb"(X: x\r\n){2000}",
            "half-upgrade": self.UPGRADE + rb"$",
            "half-frame": self.FRAMED + rb"\x81\xfe\x0f\xa0(?s:.{1996})$",
            "fragments": self.FRAMED + rb"\x01\x80mask(\0\x80mask){400}",
            "pings": self.FRAMED + rb"(?s:\x89\xc0.{68}){400}",
        }
        self.assertEqual(list(wanted), list(loadtest.FAULTS))
        for name, sight in wanted.items():
            with self.subTest(name):
                self.setUp()  # a witness of its own: what is on its way from the last one is no matter
                with self.disturber(self.port, loadtest.FAULTS[name].act):
                    found = self.witness.sees(sight)
                self.assertTrue(found, self.witness.seen[:1000])

    def test_how_it_ended_is_told(self) -> None:
        bad = b":s 464 d :No\r\nERROR :Bad password for d0x1\r\n"
        for text, words in ((bad, "Bad password for ..."), (b"", "without")):
            with self.subTest(text), socket.create_server(("127.0.0.1", 0)) as listener:
                with self.disturber(listener.getsockname()[1], loadtest.Peer.listen) as peer:
                    for _ in range(3):
                        with listener.accept()[0] as sock:
                            sock.sendall(text)
                fate = loadtest.fates([peer])
                self.assertGreaterEqual(fate["closed"][0][1], 2)
                self.assertIn(words, fate["closed"][0][0])

    def test_who_was_dropped_without_reading_finds_out_at_the_end(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        with self.disturber(listener.getsockname()[1], loadtest.FAULTS["stalled"].act) as peer:
            with listener, listener.accept()[0] as sock:
                sock.sendall(b":s 001 d :hi\r\n")
                seen = b""
                while b"JOIN" not in seen:
                    seen += sock.recv(4096)
                sock.sendall(b":a!a@h PRIVMSG #load :x\r\n" * 100 + b"ERROR :Reads too slowly\r\n")
            time.sleep(loadtest.DISTURBER_PAUSE_S)  # so that it was there for long enough to be asked about
        self.assertEqual(loadtest.fates([peer])["closed"], [["Reads too slowly", 1, None]])

    def test_a_newcomer_who_is_turned_away_counts_as_waiting(self) -> None:
        server, port = self.server()
        self.addCleanup(server.terminate)
        load = self.load()._replace(password="")
        for peer_port, wanted in ((port, False), (self.port, True)):
            target: Any = types.SimpleNamespace(servers=lambda port=peer_port: [("127.0.0.1", port)])
            with mock.patch.object(loadtest, "JOIN_S", 3.0):
                run = loadtest.Run(load, target, lambda run: None)
                self.witness.listener.close()  # refuses
                self.assertEqual(run.client(0).visit() == 3.0, wanted)
                for client in run.clients:
                    client.sock.close()

    def test_they_begin_when_told_and_end_with_who_told_them(self) -> None:
        where = ("--host", "127.0.0.1", "--port", str(self.port))
        never_told = self.start("--disturb", "silent", *where, file="loadtest.py")
        self.assertEqual((*self.done(never_told), self.witness.seen), (0, "ready\n", "", b""))
        program = self.start("--disturb", "silent", *where, file="loadtest.py", stdin=subprocess.PIPE)
        assert program.stdin and program.stdout
        self.assertEqual(program.stdout.readline(), "ready\n")
        program.stdin.write("\n")
        program.stdin.flush()
        self.assertTrue(self.witness.sees(rb"^\n{500,}$"))
        out, err = program.communicate(timeout=PATIENCE)
        self.assertEqual((program.returncode, err), (0, ""))
        self.assertGreaterEqual(json.loads(out)["connections"], 500)  # more when some came too slowly and tried again

    def test_runs_with_faults(self) -> None:
        proxy = Proxy(self.server()[1], "drop", "c5")
        self.addCleanup(proxy.listener.close)
        few = ("-n", "6", "-S", "3", "-r", "100", "-d", "1", "-w", "0.1")
        spoilt = self.loadtest(*few, "--port", str(proxy.port), "--faults", "rooms")
        server = f"{sys.executable} {HERE / 'chat.py'} server --port {{port}}"
        files = ("--json", f"{self.folder}/json", "--html", f"{self.folder}/html")
        status, out, err = self.done(
            self.loadtest(*few, *files, "--faults", "stalled,resets", "--server-command", server)
        )
        self.assertEqual((status in (0, 1, 99), err), (True, ""), out)  # how long it took is a matter of the machine
        found = self.document("json")
        self.assertIn("<h2>Faults</h2>", (self.folder / "html").read_text(encoding="utf-8"))
        self.assertRegex(out, r"^fault .*\n\nstalled +5 +0 +0 .*\n.*stayed 5(?s:.*)\nresets +8 +0 +0 ")
        self.assertEqual([row["name"] for row in found["faults"]], ["stalled", "resets"])
        for row in found["faults"]:
            self.assertLess(row["newcomers"], 1000 * loadtest.JOIN_S)  # it was let in each time
        for result in found["results"]:
            latency = result["latency"]
            halves = [latency[half]["samples"] for half in ("undisturbed", "disturbed")]
            self.assertGreater(min(halves), 0)
            self.assertEqual(sum(halves), latency["corrected"]["samples"])
            self.assertGreater(latency["newcomers"]["samples"], 0)
        status, out, _ = self.done(spoilt)
        self.assertEqual(status, 1, out)
        self.assertRegex(out, r"\nFAIL  0 of 1 kinds of fault within bounds: ")
        self.assertRegex(out, r"fault +rooms, join new channels, peers 4\n(?s:.*)c5 never got(?s:.*)\nrooms +4 +1 +0 ")

    def test_limits_hold_for_them_at_a_server_that_is_started(self) -> None:
        args = loadtest.parser().parse_args(["--faults"])
        with loadtest.fault_requirements(args):
            ((kind, command),) = loadtest.targets(args)
            password = pathlib.Path(args.password_file).read_text(encoding="ascii").strip()
            self.assertEqual(loadtest.load_from_args(args).password, password)
            self.assertGreater(len(password), 8)
        self.assertEqual(kind, "command")
        self.assertRegex(
            command, rf"--exempt 127\.0\.0\.1/32 --password-file {re.escape(args.password_file)}( --tls-cert \S+)?$"
        )
        self.assertFalse(os.path.exists(args.password_file))
        self.assertEqual(args.faults, list(loadtest.FAULTS))


class LoadOfForeignServers(LoadTestCase):
    def against_ngircd(self, extra: str, *args: str) -> Any:
        folder, port = self.folder, held_port(self)
        plain = held_port(self) if extra else port
        text = ngircd_config("irc.test", plain, False, "Password = secret\n") + extra.format(folder=folder, port=port)
        (folder / "conf").write_text(text, encoding="ascii")
        (folder / "password").write_text("secret\n", encoding="ascii")
        if extra:
            names = ["-keyout", f"{folder}/key", "-out", f"{folder}/cert", "-subj", "/CN=irc.test"]
            make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
            subprocess.run(make, check=True, stderr=subprocess.DEVNULL, timeout=PATIENCE)
        args = ("-q", *self.QUICK, *args, "--password-file", f"{folder}/password", "--json", f"{folder}/json")
        args = (*args, "--server-command", f"{shutil.which('ngircd')} -n -f {folder}/conf")
        with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(loadtest, "free_port", return_value=port):
            self.assertEqual(loadtest.main([*args]), 0)
        found = self.document("json")["results"][0]
        self.assertEqual(found["verdict"], "PASS")
        self.whole(found)
        return found

    @unittest.skipUnless(shutil.which("ngircd"), "needs ngircd")
    def test_a_foreign_server(self) -> None:
        self.against_ngircd("")

    @unittest.skipUnless(shutil.which("ngircd") and shutil.which("openssl"), "needs ngircd and openssl")
    def test_a_foreign_server_over_tls(self) -> None:
        ports = "[SSL]\nCertFile = {folder}/cert\nKeyFile = {folder}/key\nPorts = {port}\n"
        self.assertEqual(self.against_ngircd(ports, "--tls")["clock"], "that of recv")

    @unittest.skipUnless(shutil.which("ngircd"), "needs ngircd")
    def test_two_linked_servers(self) -> None:
        ports = [held_port(self), held_port(self)]
        for number, how in enumerate(("Passive = yes", f"Port = {ports[0]}")):
            link = f"[Server]\nName = irc{1 - number}.test\nHost = 127.0.0.1\nMyPassword = x\nPeerPassword = x\n"
            text = ngircd_config(f"irc{number}.test", ports[number], False, "") + link + how
            config = self.folder / f"{number}.conf"
            config.write_text(text, encoding="ascii")
            with mock.patch.object(loadtest, "free_port", return_value=ports[number]):
                self.addCleanup(loadtest.Target("", 0, [str(shutil.which("ngircd")), "-n", "-f", str(config)]).stop)
        # They link after a second: the clients have joined by then, and wait until both servers know of all.
        both = [word for port in ports for word in ("--target", f"127.0.0.1:{port}")]
        status, out, err = self.done(self.loadtest(*self.QUICK, *both, "--json", f"{self.folder}/json"))
        self.assertEqual(err, "")
        found = self.document("json")["results"][0]
        self.assertEqual(found["target"]["name"], f"127.0.0.1:{ports[0]} + 127.0.0.1:{ports[1]}")
        self.whole(found)
        # A network promises no single order of all messages; whether it kept one is a matter of luck.
        failed = {check["check"] for check in found["checks"] if check["verdict"] != "pass"}
        self.assertLessEqual(failed, {"order"}, out)
        self.assertEqual(status, len(failed))

    def test_servers_that_are_not_linked(self) -> None:
        ports = [self.server()[1], self.server()[1]]
        complaint, both = io.StringIO(), [word for port in ports for word in ("--target", f"127.0.0.1:{port}")]
        with mock.patch.object(loadtest, "JOIN_S", 1.0), contextlib.redirect_stderr(complaint):
            self.assertEqual(loadtest.main(["-n", "5", *both, "-q"]), 2)
        text = f"loadtest.py: 127.0.0.1:{ports[0]} has not heard of 2 of 5 clients within 1 s: is it linked?\n"
        self.assertEqual(complaint.getvalue(), text)


# The suite: spread over processes, because most tests wait most of the time.


def work(pipe: Any, program: str) -> None:
    """A process that runs each test it is sent, and answers with what came of it, until nobody sends any more."""
    test: Any = None
    ProgramCase.CHAT = program

    def stop(*_: Any) -> None:
        for name in ("SIGINT", "SIGTERM"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)  # what follows tidies up
        raise KeyboardInterrupt

    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), stop)
    try:
        while True:
            test = pipe.recv()
            result = unittest.TestResult()
            unittest.TestSuite([test]).run(result)
            pipe.send(outcome(test, result))
    except (EOFError, OSError):
        return
    except KeyboardInterrupt:
        if test:
            test.doCleanups()  # ends what it started
        os._exit(130)


Outcome = List[Tuple[str, str]]  # methods of a TestResult, each with a text
BROKEN = {"addFailure", "addError"}


def outcome(test: unittest.TestCase, result: unittest.TestResult) -> Outcome:
    """What came of one test."""
    found = [("addSkip", reason) for _, reason in result.skipped]
    for method, broken in (("addFailure", result.failures), ("addError", result.errors)):
        found += [(method, text if part is test else f"{part}\n{text}") for part, text in broken]
    if result.unexpectedSuccesses:
        found.append(("addFailure", "unexpected success"))
    return found or [("addSuccess", "")]


class Elsewhere(Exception):
    """Carries the traceback of a test in another process."""


def tell(result: unittest.TestResult, test: unittest.TestCase, found: Outcome, seconds: float) -> None:
    """Adds what came of a test, and how long it took."""
    result.startTest(test)
    if hasattr(result, "addDuration"):  # since Python 3.12
        result.addDuration(test, seconds)
    for method, text in found:
        args = [(Elsewhere, Elsewhere(f"\n{text}"), None)] if method in BROKEN else [text] if text else []
        getattr(result, method)(test, *args)
    result.stopTest(test)


class Worker:
    """Runs one test at a time in a process, which is spawned: it shares nothing with us but Python's flags."""

    def __init__(self, program: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, program), daemon=True)
        self.process.start()
        other.close()  # or we would not see that the process has ended
        self.test: Any = None

    def begin(self, test: unittest.TestCase) -> None:
        self.test, self.began = test, time.monotonic()
        self.pipe.send(test)

    def answer(self) -> Outcome:
        """What came of the test; or that its process is no more, which leaves no `test` here."""
        try:
            found: Outcome = self.pipe.recv()
            return found
        except (EOFError, OSError):
            self.process.join(PATIENCE)
            self.test = None
            return [("addError", f"its process ended with {self.process.exitcode}")]

    def end(self) -> None:
        """Begins to end the process, and what a test has started there."""
        if self.test:
            self.process.terminate()
        self.pipe.close()

    def ended(self) -> None:
        self.process.join(PATIENCE)
        self.process.kill()


class Spread(unittest.TestSuite):
    """Tests that are run by several workers; whole programs, which stand last here and take longest, first.

    A few that break are run once more, alone: on a busy machine they may have been unlucky. What passes then counts as
    passed, and what broke at first is shown.
    """

    WORKERS = 3 + (os.cpu_count() or 1)
    RERUNS = 3  # more is no bad luck

    def run(self, result: unittest.TestResult, debug: bool = False) -> unittest.TestResult:
        order = list(globals())
        waiting = sorted(self, key=lambda test: order.index(type(test).__name__))
        with tempfile.TemporaryDirectory() as folder:
            program = str(py_compile.compile(ProgramCase.CHAT, f"{folder}/chat.pyc", doraise=True))
            broken = self.some(waiting, self.WORKERS, program, result)
            again = [test for test, _ in broken] if len(broken) <= self.RERUNS else []
            still = {test for test, _ in self.some(again[:], 1, program, result)}
        for test, found in broken:
            if test in still or not again or result.shouldStop:
                tell(result, test, found, 0.0)
            else:
                print(f"\nUNSTABLE: {test} passed alone; at first:\n{found[0][1]}", file=sys.stderr)
        return result

    def some(self, waiting: list[Any], workers: int, program: str, result: Any) -> list[tuple[Any, Outcome]]:
        """Runs tests, the last one first; returns the broken ones."""
        idle: list[Worker] = []
        busy: dict[Any, Worker] = {}
        broken: list[tuple[Any, Outcome]] = []
        try:
            while (waiting or busy) and not (result.shouldStop or broken and result.failfast):
                while waiting and len(busy) < workers:
                    worker = idle.pop() if idle else Worker(program)
                    worker.begin(waiting.pop())
                    busy[worker.pipe] = worker
                for pipe in multiprocessing.connection.wait(list(busy)):
                    worker = busy.pop(pipe)
                    test, found = worker.test, worker.answer()
                    if BROKEN.intersection(method for method, _ in found):
                        broken.append((test, found))
                    else:
                        tell(result, test, found, time.monotonic() - worker.began)
                    (idle if worker.test else []).append(worker)
                    worker.test = None
        finally:
            for worker in (*idle, *busy.values()):
                worker.end()
            for worker in (*idle, *busy.values()):
                worker.ended()
        return broken


def singly(suite: Any) -> Iterator[unittest.TestCase]:
    """The tests of a suite."""
    for item in suite:
        yield from singly(item) if isinstance(item, unittest.TestSuite) else [item]


class Runner(unittest.TextTestRunner):
    """Runs the tests of a single class here, where they can be debugged, and others spread."""

    def run(self, test: Any) -> Any:
        tests = list(singly(test))
        kinds = {type(one) for one in tests}
        here = len(kinds) < 2 or any(kind.__module__ != __name__ for kind in kinds) or self.buffer or self.tb_locals
        return super().run(test if here else Spread(tests))


if __name__ == "__main__":
    unittest.main(testRunner=Runner)
