#!/usr/bin/env python3
"""Tests of chat.py, in its order: pure parts, real sockets, whole programs. Run: python test_chat.py"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from typing import Any, Callable, Dict, List, Optional, Set, Tuple
from unittest import mock

import chat
from chat import Message

HERE = pathlib.Path(__file__).resolve().parent
PATIENCE = 20.0  # seconds before a test gives up; never a measure of speed
SOURCE = (HERE / "chat.py").read_text(encoding="utf-8")


class Shape(unittest.TestCase):
    """The file itself: its map, its layers, the size of its pieces."""

    def sections(self) -> Dict[str, Tuple[int, int]]:
        lines = SOURCE.splitlines()
        bar = "# " + "-" * 77
        starts = [i for i in range(1, len(lines) - 1) if lines[i - 1] == lines[i + 1] == bar]
        ends = [*starts[1:], len(lines) + 2]
        return {lines[start][2:]: (start + 1, end - 1) for start, end in zip(starts, ends)}

    def test_docstring_maps_the_sections(self) -> None:
        listed = re.findall(r"^    (\w[\w ]*?)  +\S", chat.__doc__ or "", re.MULTILINE)
        listed = [name for name in listed if not name.startswith("python")]
        self.assertEqual(listed, list(self.sections()))

    def test_functions_and_classes_are_short(self) -> None:
        for path in HERE.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    bound = 200 if isinstance(node, ast.ClassDef) else 40
                    self.assertLessEqual((node.end_lineno or 0) - node.lineno + 1, bound, f"{path.name}: {node.name}")

    def test_sections_use_only_what_they_may_know(self) -> None:
        io = {"socket", "select", "selectors", "subprocess", "signal"}
        forbidden = {name: io | {"threading"} for name in list(self.sections())[:5] + ["commands"]}
        forbidden["chat state"] = io
        tree = ast.parse(SOURCE)
        for name, (first, last) in self.sections().items():
            for node in ast.walk(tree):
                if isinstance(node, ast.Name) and first <= node.lineno <= last:
                    self.assertNotIn(node.id, forbidden.get(name, set()), f"{name}, line {node.lineno}")

    def test_only_the_standard_library(self) -> None:
        for node in ast.walk(ast.parse(SOURCE)):
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
        self.assertLess(chat.LOG_BROADCASTS * chat.LINE_BYTES, chat.OUTBOX_BYTES)


class Names(unittest.TestCase):
    GOOD = ["bob", "Борис", "美咲", "José", "山田たろう", "홍길동", "_x", "`a", "[x]", "a-b", "x1", "दिल्ली", "ñ" * 24]
    BAD = ["", "1bob", "-x", "a b", "a\x1b[31m", "bоb", "a\u202eb", "a\u200db", "bob\u034f", "\u3164", "a,b",
           "b\udcff", "x" * 25, "美" * 22, "a!b", "a@b", "*", "bob\ufe0f", "a\x00"]  # fmt: skip

    def test_good(self) -> None:
        for name in self.GOOD:
            with self.subTest(name):
                self.assertEqual(chat.check_nick(name), name)

    def test_bad(self) -> None:
        for name in self.BAD:
            with self.subTest(name), self.assertRaises(chat.Refused) as caught:
                chat.check_nick(name)
            self.assertEqual(caught.exception.numeric, chat.ERR_ERRONEUSNICKNAME)

    def test_names_are_normalised(self) -> None:
        self.assertEqual(chat.check_nick("Jose\u0301"), "José")

    def test_one_name_in_many_spellings(self) -> None:
        for one, other in (
            ("Bob", "bOB"),
            ("БОРИС", "борис"),
            ("ｂｏｂ", "bob"),
            ("𝐛𝐨𝐛", "bob"),
            ("STRASSE", "straße"),
        ):
            with self.subTest(one):
                self.assertEqual(chat.fold(one), chat.fold(other))
        self.assertNotEqual(chat.fold("bob"), chat.fold("rob"))

    def test_channels(self) -> None:
        for name in ("#chat", "#Über-uns", "#"):
            self.assertEqual(chat.check_channel(name), name)
        for name in ("chat", "", "#a b", "#a,b", "#\x07", "#\u200b", "#" + "x" * 50, "#" + "美" * 22):
            with self.subTest(name), self.assertRaises(chat.Refused):
                chat.check_channel(name)

    def test_next_nick(self) -> None:
        self.assertEqual(chat.next_nick("bob"), "bob2")
        self.assertEqual(chat.next_nick("bob9"), "bob10")
        self.assertEqual(chat.next_nick("x" * 24), "x" * 23 + "2")
        self.assertEqual(chat.next_nick("\U00020000" * 16), "\U00020000" * 15 + "2")


class WireFormat(unittest.TestCase):
    LINES = [
        ("PING x", Message("PING", ("x",))),
        ("privmsg #chat :hello  there ", Message("PRIVMSG", ("#chat", "hello  there "))),
        (":a!b@c  PRIVMSG   #chat  :x", Message("PRIVMSG", ("#chat", "x"), "a!b@c")),
        ("@a=1;b;+c=x\\:\\s\\\\ PING :", Message("PING", ("",), "", {"a": "1", "b": "", "+c": "x; \\"})),
        ("JOIN :", Message("JOIN", ("",))),
        ("X :a :b", Message("X", ("a :b",))),
        ("", Message("")),
        (":", Message("")),
        ("@", Message("", (), "", {})),
        ("A " + " ".join("123456789abcdefgh"), Message("A", tuple("123456789abcdef"))),
    ]

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

    def test_line_buffer(self) -> None:
        cases: List[Tuple[bytes, List[Optional[bytes]], bytes]] = [
            (b"a\nb\r\nc", [b"a", b"b"], b"c"),
            (b"\n\r\n\n", [], b""),
            (b"a\rb\n", [b"a\rb"], b""),
            (b"0123456789\n", [b"0123456789"], b""),
            (b"0123456789a\nb\n", [None, b"b"], b""),
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
        reported = [line for _ in range(256) for line in buffer.feed(b"x" * 4096)]
        self.assertEqual(reported, [None])
        self.assertLessEqual(len(buffer._tail), 512)

    def test_split_text(self) -> None:
        for text, size, pieces in (
            ("hello world", 20, ["hello world"]),
            ("hello world", 8, ["hello", "world"]),
            ("hello world", 5, ["hello", "world"]),
            ("abcdefgh", 3, ["abc", "def", "gh"]),
            ("ééé", 5, ["éé", "é"]),
            ("", 5, []),
        ):
            with self.subTest(text, size=size):
                self.assertEqual(chat.split_text(text, size), pieces)

    def test_server_time(self) -> None:
        self.assertEqual(chat.server_time(1769860800.5), "2026-01-31T12:00:00.500Z")


class TextForm(unittest.TestCase):
    BOB = "bob!bob@host"
    CASES = [
        (Message("PRIVMSG", ("#chat", "hello"), BOB), "bob: hello"),
        (Message("NOTICE", ("#chat", "hello"), BOB), "bob: hello"),
        (Message("PRIVMSG", ("ann", "psst"), BOB), "[private] bob: psst"),
        (Message("PRIVMSG", ("#chat", "\x01ACTION waves\x01"), BOB), "* bob waves"),
        (Message("JOIN", ("#chat",), BOB, {chat.COUNT_TAG: "3"}), "*** bob joined (3 here)"),
        (Message("JOIN", ("#chat",), BOB), "*** bob joined"),
        (Message("QUIT", ("gone home",), BOB), "*** bob left: gone home"),
        (Message("QUIT", (), BOB), "*** bob left"),
        (Message("PART", ("#chat",), BOB), "*** bob left"),
        (Message("PART", ("#chat", "bye"), BOB), "*** bob left: bye"),
        (Message("NICK", ("rob",), BOB), "*** bob is now rob"),
        (Message("TOPIC", ("#chat", "tea"), BOB), "*** bob set the topic: tea"),
        (Message("ERROR", ("Server is shutting down",), "chat.local"), "*** Server is shutting down"),
        (Message("NOTICE", ("*", "hi"), "chat.local"), "*** hi"),
        (
            Message("433", ("*", "bob", chat.ERR_NICKNAMEINUSE.text), "chat.local"),
            "*** Error: that name is taken; send another",
        ),
        (Message("353", ("ann", "=", "#chat", "@ann bob"), "s"), "*** In #chat: @ann bob"),
        (Message("001", ("ann", "Welcome"), "s"), ""),
        (Message("PONG", ("a", "b"), "s"), ""),
        (Message("PRIVMSG", ("#chat", "\x1b[31mred\x9b\u202e"), BOB), "bob: \\x1b[31mred\\x9b<U+202E>"),
        (
            Message("PRIVMSG", ("#chat", "你好\u3000世界\xa0\U0001fae8 a\u200db"), BOB),
            "bob: 你好\u3000世界\xa0\U0001fae8 a<U+200D>b",
        ),
        (Message("JOIN", ("#chat",), BOB, {chat.COUNT_TAG: "\x1b[2J"}), "*** bob joined (\\x1b[2J here)"),
        (Message("QUIT", ("\x07\x7f",), BOB), "*** bob left: \\x07\\x7f"),
        (Message("PRIVMSG", ("#chat", "*** ann left {0}"), BOB), "bob: *** ann left {0}"),
    ]

    def test_text_form(self) -> None:
        for message, text in self.CASES:
            with self.subTest(message):
                self.assertEqual(chat.text_form(message), text)

    def test_never_fails_for_missing_parameters(self) -> None:
        for command in [*chat.NUMERICS, *chat.EVENT_FORMS, "PRIVMSG", "ACK", "999", ""]:
            for params in ((), ("",), ("a", "{1}")):
                self.assertIsInstance(chat.text_form(Message(command, params, "x!y@z")), str)
                self.assertIsInstance(chat.text_form(Message(command, params)), str)

    def test_typed(self) -> None:
        for line, message in (
            ("hello", Message("PRIVMSG", ("#x", "hello"))),
            ("  indented", Message("PRIVMSG", ("#x", "  indented"))),
            ("//slash", Message("PRIVMSG", ("#x", "/slash"))),
            ("/msg bob how are you", Message("PRIVMSG", ("bob", "how are you"))),
            ("/me waves at all", Message("PRIVMSG", ("#x", "\x01ACTION waves at all\x01"))),
            ("/NICK rob", Message("NICK", ("rob",))),
            ("/who", Message("NAMES", ("#x",))),
            ("/join #y", Message("JOIN", ("#y",))),
            ("/topic", Message("TOPIC", ("#x",))),
            ("/topic tea time", Message("TOPIC", ("#x", "tea time"))),
            ("/quit", Message("QUIT")),
            ("/quit gone home", Message("QUIT", ("gone home",))),
            (" exit ", Message("QUIT")),
            ("exit now", Message("PRIVMSG", ("#x", "exit now"))),
            ("/help", Message("HELP")),
        ):
            with self.subTest(line):
                self.assertEqual(chat.typed(line, "#x"), message)

    def test_typed_wrongly(self) -> None:
        for line, text in (
            ("/dance", "/dance is not a command; /help lists them (//text sends a line with a slash)"),
            ("/msg bob", "it is /msg NAME TEXT"),
            ("/nick", "it is /nick NAME"),
        ):
            with self.subTest(line), self.assertRaises(chat.Refused) as caught:
                chat.typed(line, "#x")
            self.assertEqual(caught.exception.params, (text,))


class Dialects(unittest.TestCase):
    def test_the_first_line_decides(self) -> None:
        for line, dialect in (
            (b'{"type":"join"}', chat.JSON),
            (b"NICK bob", chat.irc()),
            (b"cap LS 302", chat.irc()),
            (b"user a b c d", chat.irc()),
            (b"PASS x", chat.irc()),
            (b"PING x", chat.irc()),
            (b"NICK", chat.PLAIN),
            (b"nick ", chat.PLAIN),
            (b"Nicky", chat.PLAIN),
            (b"GET / HTTP/1.1", chat.HTTP),
            (b"POST /x HTTP/1.0", chat.HTTP),
            (b"bob", chat.PLAIN),
            (b"\xff\xfd\x01bob", chat.PLAIN),
            (b"", chat.PLAIN),
        ):
            with self.subTest(line):
                self.assertIs(chat.dialect_of(line), dialect)

    def test_equal_capabilities_are_one_view(self) -> None:
        self.assertIs(chat.irc(frozenset({"server-time"})), chat.irc(frozenset(["server-time"])))

    def test_plain(self) -> None:
        join = [
            Message("NICK", ("bob",)),
            Message("USER", ("plain", "0", "*", "plain user")),
            Message("JOIN", ("#chat",)),
        ]
        self.assertEqual(chat.PLAIN.decode(b"\xff\xfb\x1f\xff\xfa\x1fxx\xff\xf0bob", False), join)
        self.assertEqual(chat.PLAIN.decode(b" ", False), [])
        self.assertEqual(chat.PLAIN.decode(b"exit", False), [Message("QUIT")])
        self.assertEqual(chat.PLAIN.decode("é".encode(), True), [Message("PRIVMSG", ("*", "é"))])
        for line in (b"\xc3", b"a\rb", b"a\0b"):
            with self.subTest(line), self.assertRaises(chat.Refused):
                chat.PLAIN.decode(line, True)

    def test_json_decode(self) -> None:
        for item, message in (
            ({"type": "chat", "text": "hi", "unknown": [1]}, Message("PRIVMSG", ("*", "hi"))),
            ({"type": "chat", "text": "hi", "ref": "7"}, Message("PRIVMSG", ("*", "hi"), "", {"label": "7"})),
            ({"type": "private", "to": "ann", "text": "psst"}, Message("PRIVMSG", ("ann", "psst"))),
            ({"type": "leave"}, Message("QUIT", ("",))),
            ({"type": "command", "text": "/who"}, Message("NAMES", ("*",))),
        ):
            with self.subTest(item):
                self.assertEqual(chat.JSON.decode(json.dumps(item).encode(), True), [message])
        self.assertEqual(chat.JSON.decode(b'{"type":"join"}', False)[0], Message("GUEST"))

    def test_json_refuses(self) -> None:
        for line in (
            b"{", b"{}", b"[1]", b'{"type":5}', b'{"type":[]}', b'{"type":"dance"}', b'{"type":"chat"}', b"\xff",
            b'{"type":"chat","text":5}', b'{"type":"chat","text":"a\\nb"}', b'{"type":"chat","text":"a\\u0000b"}',
            b'{"type":"chat","text":"\\ud800"}', b'{"type":"chat","text":"a","ref":7}', b'{"a":' * 4000,
            b"[" * 4000, b'{"a":' + b"9" * 4000,
        ):  # fmt: skip
            with self.subTest(line[:40]), self.assertRaises(chat.Refused):
                chat.JSON.decode(line, True)

    def test_patterns_take_linear_time(self) -> None:
        size = 1 << 20  # would take minutes if a search began anew at every place
        chat.JSON_STRING.sub("", '"' + '\\"' * size)
        chat.TELNET.sub(b"", b"\xff\xfa" * size)

    def test_json_takes_brackets_in_text(self) -> None:
        text = "[{" * 100
        line = json.dumps({"type": "chat", "text": text}).encode()
        self.assertEqual(chat.JSON.decode(line, True), [Message("PRIVMSG", ("*", text))])

    STAMP = {"id": "M", "time": "T"}
    TAGS = {"time": "T", "msgid": "M", chat.COUNT_TAG: "3"}
    BOB = TextForm.BOB
    JSON_OUT = [
        (
            Message("PRIVMSG", ("#chat", "hi"), BOB, TAGS),
            {"type": "chat", "user": "bob", "text": "hi", "channel": "#chat", **STAMP},
        ),
        (
            Message("PRIVMSG", ("#chat", "\x01ACTION waves\x01"), BOB, TAGS),
            {"type": "chat", "user": "bob", "text": "waves", "action": True, "channel": "#chat", **STAMP},
        ),
        (
            Message("PRIVMSG", ("ann", "hi"), BOB, TAGS),
            {"type": "private", "user": "bob", "text": "hi", "to": "ann", **STAMP},
        ),
        (
            Message("JOIN", ("#chat",), BOB, TAGS),
            {
                "type": "system",
                "event": "join",
                "user": "bob",
                "channel": "#chat",
                "text": "*** bob joined (3 here)",
                **STAMP,
            },
        ),
        (
            Message("433", ("*", "bob", "that name is taken; send another"), "s"),
            {"type": "error", "code": "name-taken", "text": "that name is taken; send another"},
        ),
        (
            Message("FAIL", ("PRIVMSG", "INVALID_UTF8", "no"), "s"),
            {"type": "error", "code": "invalid-utf8", "text": "no"},
        ),
        (Message("ACK", (), "s", {**TAGS, "label": "7"}), {"type": "ack", "ref": "7", **STAMP}),
        (
            Message("353", ("x", "=", "#chat", "@ann bob"), "s"),
            {
                "type": "system",
                "event": "names",
                "users": ["ann", "bob"],
                "channel": "#chat",
                "text": "*** In #chat: @ann bob",
            },
        ),
    ]

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
            ((), b":n!u@h PRIVMSG #c :x\r\n"),
            (("server-time",), b"@time=T :n!u@h PRIVMSG #c :x\r\n"),
            (("message-tags",), b"@msgid=M;+a=b\\sc :n!u@h PRIVMSG #c :x\r\n"),
            (("message-tags", "server-time"), b"@time=T;msgid=M;+a=b\\sc :n!u@h PRIVMSG #c :x\r\n"),
        ):
            self.assertEqual(chat.irc(frozenset(caps)).encode(message), line)
        self.assertEqual(chat.irc().encode(Message("TAGMSG", ("#c",), "n!u@h")), b"")
        self.assertEqual(chat.irc().encode(chat.PROMPT), b"")

    def test_irc_line_lengths(self) -> None:
        irc = chat.irc()
        self.assertTrue(irc.decode(b"PING :" + b"x" * 504, True))
        self.assertTrue(irc.decode(b"@" + b"a" * 4094 + b" PING :" + b"x" * 504, True))
        for line in (b"PING :" + b"x" * 505, b"@" + b"a" * 4095 + b" PING x"):
            with self.assertRaises(chat.Refused) as caught:
                irc.decode(line, True)
            self.assertEqual(caught.exception.numeric, chat.ERR_INPUTTOOLONG)


class State(unittest.TestCase):
    """The log and its fan-out against a model that does it the slow and obvious way."""

    def test_fan_out_matches_the_obvious_way(self) -> None:
        for seed in range(300):
            with self.subTest(seed=seed):
                self.fan_out_once(random.Random(seed))

    def fan_out_once(self, rng: random.Random) -> None:
        hub = chat.Hub("s")
        views = [chat.PLAIN, chat.JSON, chat.irc(), chat.irc(frozenset({"server-time"}))]
        sessions = [chat.Session("h", 0.0) for _ in range(rng.randint(1, 12))]
        for number, session in enumerate(sessions):
            session.view, session.nick, session.prefix = rng.choice(views), f"u{number}", f"u{number}!u@h"
        channels = [chat.Channel(f"#{name}") for name in "ab"]
        expected: Dict[chat.Session, List[bytes]] = {session: [] for session in sessions}
        got: Dict[chat.Session, bytes] = {session: b"" for session in sessions}
        for step in range(rng.randint(1, 60)):
            session, channel = rng.choice(sessions), rng.choice(channels)
            message = Message("PRIVMSG", (channel.name, str(step)), session.prefix, {"time": "T"})
            inside = channel in session.channels
            kind = rng.random()
            if kind < 0.3 and not inside:
                channel.add(session)
            elif kind < 0.45 and inside:
                channel.remove(session)
            elif kind < 0.6:
                hub.tell_locked(session, message)
                expected[session].append(session.view.encode(message))
            elif kind < 0.9:
                but = session if rng.random() < 0.5 else None
                hub.send_locked(message, channel.roster, but)
                for member in sessions:
                    if channel in member.channels and member is not but:
                        expected[member].append(member.view.encode(message))
            else:
                self.collect(hub, got)
        self.collect(hub, got)
        self.assertEqual(got, {session: b"".join(lines) for session, lines in expected.items()})

    def collect(self, hub: chat.Hub, got: Dict[chat.Session, bytes]) -> None:
        seen: Set[chat.Session] = set()
        for session, data in chat.fan_out(hub.take()[0]):
            self.assertNotIn(session, seen, "two sends to one recipient")
            seen.add(session)
            got[session] += data

    def test_a_message_is_encoded_once_per_view(self) -> None:
        hub, channel = chat.Hub("s"), chat.Channel("#a")
        view = mock.Mock(wraps=chat.irc())
        for _ in range(50):
            session = chat.Session("h", 0.0)
            session.view = view
            channel.add(session)
        for number in range(3):
            hub.send_locked(Message("PRIVMSG", ("#a", str(number)), "x!y@z"), channel.roster, session)
        self.assertEqual(len(list(chat.fan_out(hub.take()[0]))), 50)
        self.assertEqual(view.encode.call_count, 3)

    def test_an_answer_in_the_same_tick_of_the_clock_is_an_answer(self) -> None:
        hub, session = chat.Hub("s"), chat.Session("h", 0.0)
        session.registered, session.view = True, chat.irc()
        with hub:
            hub._ping_locked(session, 100.0, 60.0)
            session.heard = 100.0
            self.assertEqual(hub._examine_locked(session, 160.0), 190.0)
        self.assertFalse(session.gone)

    def test_refusals_wait_for_room_like_everything_else(self) -> None:
        hub, session = chat.Hub("s"), chat.Session("h", 0.0)
        with mock.patch.object(hub, "wait_for_room_locked") as wait:
            for line in (None, b"\xff", b"bob"):
                chat.perform(hub, session, line)
        self.assertEqual(wait.call_count, 3)

    def test_names_are_kept_in_step(self) -> None:
        channel, sessions = chat.Channel("#a"), [chat.Session("h", 0.0) for _ in range(200)]
        rng = random.Random(2)
        for number, session in enumerate(sessions):
            session.nick = f"user{number}"
            channel.add(session)
            if number % 3 == 2:
                channel.remove(rng.choice(channel.roster.present()))
            names = " ".join(channel.names()).split()
            self.assertEqual(names, [channel.title(member) for member in channel.roster.present()])
            self.assertLessEqual(max(len(chunk.encode()) for chunk in channel.names()), chat.NAMES_BYTES)

    def test_allowance(self) -> None:
        allowance = chat.Allowance(3, 10.0)
        self.assertEqual([allowance.take(100.0) for _ in range(5)], [True, True, True, False, False])
        self.assertEqual([allowance.take(110.5), allowance.take(110.5)], [True, False])

    def test_message_ids_differ_across_restarts(self) -> None:
        first = chat.Hub("s").stamp_locked()["msgid"]
        time.sleep(0.002)
        self.assertNotEqual(first, chat.Hub("s").stamp_locked()["msgid"])


class Peer:
    """A raw connection to a server under test."""

    def __init__(self, port: int, data: str = "") -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.buffer = b""
        self.seen: List[str] = []
        if data:
            self.send(data)

    def send(self, data: str) -> None:
        self.sock.sendall(data.encode())

    def line(self) -> Optional[str]:
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

    def rest(self) -> List[str]:
        """All lines up to the end of the connection."""
        return list(iter(self.line, None))

    def sync(self) -> List[str]:
        """IRC: everything that the server had sent before it answered a PING."""
        token = f"sync{random.random()}"
        self.send(f"PING {token}\r\n")
        start = len(self.seen)
        self.until(token)
        return self.seen[start:-1]

    def close(self) -> None:
        self.sock.close()


class ServerCase(unittest.TestCase):
    """A server in this process, on a free port."""

    def setUp(self) -> None:
        self.server = chat.Server("127.0.0.1", 0)
        self.port = self.server.address[1]
        self.thread = threading.Thread(target=self.server.serve)
        self.thread.start()
        self.addCleanup(self.stop)

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(PATIENCE)
        self.assertFalse(self.thread.is_alive(), "the server did not stop")

    def peer(self, data: str = "") -> Peer:
        peer = Peer(self.port, data)
        self.addCleanup(peer.close)
        return peer

    def plain(self, name: str) -> Peer:
        peer = self.peer(f"{name}\n")
        peer.until(f"*** {name} joined")
        return peer

    def irc(self, name: str, *caps: str) -> Peer:
        ask = f"CAP REQ :{' '.join(caps)}\r\n" if caps else ""
        peer = self.peer(f"{ask}NICK {name}\r\nUSER {name} 0 * :{name}\r\nCAP END\r\nJOIN #chat\r\n")
        peer.until(" 366 ")
        return peer

    def eventually(self, condition: Callable[[], Any], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            self.assertLess(time.monotonic(), end, what)
            time.sleep(0.01)


class PlainPeople(ServerCase):
    def test_two_people_talk(self) -> None:
        ann, bob = self.plain("ann"), self.plain("bob")
        self.assertEqual(ann.line(), "*** bob joined (2 here)")
        bob.send("hello everybody\n/me waves\n/msg ann psst\n/nick rob\n/topic tea\n/quit gone home\n")
        self.assertEqual(
            [ann.line() for _ in range(6)],
            [
                "bob: hello everybody",
                "* bob waves",
                "[private] bob: psst",
                "*** bob is now rob",
                "*** rob set the topic: tea",
                "*** rob left: gone home",
            ],
        )
        self.assertEqual(bob.rest(), ["*** bob is now rob", "*** rob set the topic: tea", "*** Goodbye"])

    def test_exit_is_a_word_of_its_own(self) -> None:
        bob = self.plain("bob")
        bob.send("exit\nnot said\n")
        self.assertEqual(bob.rest(), ["*** Goodbye"])

    def test_help_who_join(self) -> None:
        ann, bob = self.plain("ann"), self.plain("bob")
        bob.send("/who\n")
        self.assertEqual(bob.line(), "*** In #chat: @ann bob")
        bob.send("/help\n")
        self.assertEqual(bob.line(), "*** /help             shows this")
        bob.until("/quit")
        bob.send("/join #tea\nanyone?\n/join nothing\n")
        self.assertEqual(bob.line(), "*** bob left: went to #tea")
        self.assertEqual(bob.line(), "*** bob joined (1 here)")
        self.assertRegex(bob.line() or "", r"^\*\*\* Error: a channel is #")
        ann.until("*** bob left: went to #tea")
        ann.send("/who\n")
        self.assertEqual(ann.line(), "*** In #chat: @ann")

    def test_prompt_after_silence(self) -> None:
        quiet = self.peer()
        self.assertEqual(quiet.sock.recv(100), b"Enter your name: ")
        quiet.send("ann\n")
        self.assertEqual(quiet.line(), "*** ann joined (1 here)")

    def test_wrong_names_are_refused_and_asked_again(self) -> None:
        self.plain("bob")
        late = self.peer("BOB\nan n\n\x1b[31m\nbоb\nann\nhello\n")
        self.assertEqual(late.line(), "*** Error: that name is taken; send another")
        for _ in range(3):
            self.assertRegex(late.line() or "", r"^\*\*\* Error: a name is a letter, .*; send another$")
        self.assertEqual(late.line(), "*** ann joined (2 here)")

    def test_a_user_cannot_look_like_the_system_or_another(self) -> None:
        ann, bob = self.plain("ann"), self.plain("bob")
        ann.line()
        bob.send("*** ann left\n//me dies\n/me : hello\n")
        self.assertEqual([ann.line() for _ in range(3)], ["bob: *** ann left", "bob: /me dies", "* bob : hello"])

    def test_half_close_after_an_unended_last_line(self) -> None:
        ann, bob = self.plain("ann"), self.plain("bob")
        bob.send("first\nlast")
        bob.sock.shutdown(socket.SHUT_WR)
        ann.until("bob joined")
        self.assertEqual([ann.line() for _ in range(3)], ["bob: first", "bob: last", "*** bob left"])
        self.assertEqual(bob.rest(), [])

    def test_everything_in_one_packet_or_byte_by_byte(self) -> None:
        ann = self.plain("ann")
        for size in (1, 1000):
            bob = self.peer()
            data = "bob\r\nz\u00fcr\u00edch\n\n\nzwei\nexit\n".encode()
            for start in range(0, len(data), size):
                bob.sock.sendall(data[start : start + size])
            ann.until("bob joined")
            self.assertEqual([ann.line() for _ in range(3)], ["bob: z\u00fcr\u00edch", "bob: zwei", "*** bob left"])

    def test_http_and_tls_on_this_port(self) -> None:
        browser = self.peer("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertEqual(browser.line(), "HTTP/1.0 200 OK")
        self.assertRegex(browser.rest()[-1], "This is a chat")
        hello = self.peer()
        with self.assertLogs("chat", "WARNING") as logged:
            hello.sock.sendall(b"\x16\x03\x01\x02\x00\x01")
            self.assertEqual(hello.rest(), [])
        self.assertIn("TLS", logged.output[0])


class JsonScripts(ServerCase):
    def script(self, *items: Dict[str, Any]) -> Peer:
        return self.peer("".join(json.dumps(item) + "\n" for item in items))

    def next(self, peer: Peer) -> Dict[str, Any]:
        item = json.loads(peer.line() or "null")
        self.assertIsInstance(item, dict)
        item.pop("time", None)
        item.pop("id", None)
        return dict(item)

    def test_a_script_talks(self) -> None:
        ann = self.plain("ann")
        bot = self.script(
            {"type": "join", "user": "bot"},
            {"type": "chat", "text": "h\u00ed", "ref": "r1"},
            {"type": "private", "to": "ann", "text": "psst"},
            {"type": "command", "text": "/who"},
            {"type": "private", "to": "nobody", "text": "psst", "ref": "r2"},
            {"type": "dance"},
            {"type": "leave"},
        )
        self.assertEqual(
            [self.next(bot) for _ in range(6)],
            [
                {
                    "type": "system",
                    "event": "join",
                    "user": "bot",
                    "text": "*** bot joined (2 here)",
                    "channel": "#chat",
                },
                {"type": "ack", "ref": "r1"},
                {
                    "type": "system",
                    "event": "names",
                    "text": "*** In #chat: @ann bot",
                    "users": ["ann", "bot"],
                    "channel": "#chat",
                },
                {"type": "error", "code": "no-such-user", "text": "nobody here is called nobody", "ref": "r2"},
                {"type": "error", "code": "unknown-type", "text": chat.FAIL_BAD_TYPE.text},
                {"type": "system", "event": "closing", "text": "*** Goodbye"},
            ],
        )
        self.assertEqual(
            [ann.line() for _ in range(4)],
            ["*** bot joined (2 here)", "bot: h\u00ed", "[private] bot: psst", "*** bot left"],
        )

    def test_names_are_chosen_and_errors_told(self) -> None:
        one, two = (
            self.script({"type": "join"}),
            self.script({"type": "chat", "text": "hi"}, {"type": "join", "user": "1"}),
        )
        self.assertRegex(self.next(one)["user"], r"^guest\d+$")
        self.assertEqual(self.next(two)["code"], "not-joined")
        self.assertEqual(self.next(two)["code"], "bad-name")

    def test_errors_carry_the_ref(self) -> None:
        bot = self.script(
            {"type": "join", "user": "bot"},
            {"type": "command", "text": "/foo", "ref": "1"},
            {"type": "foo", "ref": "2"},
            {"type": "join", "channel": "0", "ref": "3"},
            {"type": "chat", "text": "still here", "ref": "4"},
        )
        self.next(bot)
        refs = [(item["type"], item["ref"]) for item in (self.next(bot) for _ in range(4))]
        self.assertEqual(refs, [("error", "1"), ("error", "2"), ("error", "3"), ("ack", "4")])

    def test_bad_lines_get_one_error_each(self) -> None:
        bot = self.script({"type": "join", "user": "bot"})
        self.next(bot)
        for line, code in ((b"{", "bad-json"), (b"{}", "unknown-type"), (b'{"\xff"}', "invalid-utf8"),
                           (b"[" * 4000, "bad-json"), (b"{" + b"x" * 9000, "too-long")):  # fmt: skip
            bot.sock.sendall(line + b"\n")
            self.assertEqual(self.next(bot)["code"], code)


class IrcClients(ServerCase):
    def test_registration_as_irssi_does_it(self) -> None:
        peer = self.peer("CAP LS 302\r\nJOIN :\r\n")
        self.assertEqual(peer.line(), f":chat.local CAP * LS :{' '.join(chat.CAPABILITIES)}")
        self.assertIn(" 451 * ", peer.line() or "")
        peer.send("CAP REQ :server-time multi-prefix\r\nNICK ann\r\nUSER ann 0 * :Ann Example\r\n")
        self.assertEqual(peer.line(), ":chat.local CAP * ACK :server-time multi-prefix")
        peer.send("CAP REQ :sasl\r\nCAP LIST\r\nCAP DANCE\r\nCAP END\r\n")
        self.assertEqual(peer.line(), ":chat.local CAP ann NAK :sasl")
        self.assertEqual(peer.line(), ":chat.local CAP ann LIST :multi-prefix server-time")
        self.assertIn(" 410 ann DANCE ", peer.line() or "")
        codes = [chat.parse(peer.line() or "").command for _ in range(14)]
        self.assertEqual(" ".join(codes), "001 002 003 004 005 005 251 252 253 254 255 375 372 376")
        tokens = [word for line in peer.seen if " 005 " in line for word in line.split(" :")[0].split()[3:]]
        for token in ("CASEMAPPING=ascii", "PREFIX=(ov)@+", "CHANMODES=b,k,l,imnt", "NICKLEN=24", "UTF8ONLY", "WHOX"):
            self.assertIn(token, tokens)

    REPLIES = [
        ("PING x", [":chat.local PONG chat.local :x"]),
        ("MODE #chat", ["324 ann #chat :+n", "329 ann #chat "]),
        ("MODE #chat b", ["368 ann #chat :"]),
        ("MODE #chat +o ann", ["482 ann #chat :"]),
        ("MODE ann", ["221 ann :+"]),
        ("MODE bob", ["502 "]),
        ("WHO #chat", ["352 ann #chat bob localhost chat.local bob G@ :0 bob", "352 ann #chat ann ", "315 ann #chat "]),
        ("WHO #tea %tcuhnfr,743", ["354 ann 743 #tea bob localhost bob G@ :bob", "315 ann #tea "]),
        ("WHO #chat %n", ["354 ann :bob", "354 ann :ann", "315 "]),
        (
            "WHOIS bob",
            [
                "311 ann bob bob localhost * :bob",
                "319 ann bob :@#chat @#tea",
                "312 ",
                "301 ann bob :brb",
                "317 ann bob 0 ",
                "318 ann bob :",
            ],
        ),
        ("WHOIS nobody", ["401 ann nobody :nobody here is called nobody", "318 ann nobody :"]),
        ("WHOWAS nobody", ["406 ann nobody :", "369 ann nobody :"]),
        ("MODE ann +i", ["221 ann :+"]),
        ("MODE ann +o", ["501 "]),
        ("PRIVMSG * :x", ["403 "]),
        ("GUEST", ["462 "]),
        ("LIST", ["321 ", "322 ann #chat 2 :", "322 ann #tea 1 :Earl Grey", "323 "]),
        ("LIST #tea", ["321 ", "322 ann #tea 1 :Earl Grey", "323 "]),
        ("NAMES #tea", ["353 ann = #tea :@bob", "366 ann #tea :"]),
        ("NAMES #nix", ["366 ann #nix :"]),
        ("TOPIC #chat", ["331 ann #chat :"]),
        ("TOPIC #tea", ["442 ann #tea :you are not in #tea"]),
        ("ISON bob nobody ANN", ["303 ann :bob ann"]),
        ("USERHOST bob ann", ["302 ann :bob=-bob@localhost ann=+ann@localhost"]),
        ("MOTD", ["375 ", "372 ", "376 "]),
        ("LUSERS", ["251 ann :There are 2 users", "252 ", "253 ", "254 ann 2 ", "255 "]),
        ("AWAY :gone", ["306 "]),
        ("AWAY", ["305 "]),
        ("NICK bob", ["433 ann bob :that name is taken; send another"]),
        ("NICK 5", ["432 ann 5 :"]),
        ("NICK", ["431 ann :"]),
        ("USER a b c d", ["462 "]),
        ("PASS x", ["462 "]),
        ("DANCE", ["421 ann DANCE :DANCE is not a command here"]),
        ("JOIN", ["461 ann JOIN :"]),
        ("JOIN nothing", ["476 "]),
        ("PART #tea", ["442 "]),
        ("PART #nix", ["403 ann #nix :there is no channel #nix"]),
        ("PRIVMSG", ["411 "]),
        ("PRIVMSG bob", ["412 "]),
        ("PRIVMSG #tea :x", ["404 ann #tea :"]),
        ("PRIVMSG nobody,#nix :x", ["401 ", "403 "]),
        ("PRIVMSG a,b,c,d,e :x", ["407 "]),
        ("PRIVMSG bob :x", ["301 ann bob :brb"]),
        ("NOTICE nobody :x", []),
        ("CAP", ["461 "]),
    ]

    def test_every_command_answers(self) -> None:
        bob = self.irc("bob")
        bob.send("JOIN #tea\r\nTOPIC #tea :Earl Grey\r\nAWAY :brb\r\n")
        bob.sync()
        ann = self.irc("ann")
        for line, replies in self.REPLIES:
            with self.subTest(line):
                ann.send(f"{line}\r\n")
                got = ann.sync()
                self.assertEqual(len(got), len(replies), got)
                for reply, wanted in zip(got, replies):
                    self.assertIn(wanted, reply)

    def test_join_part_topic_nick_quit_as_others_see_them(self) -> None:
        ann, bob = self.irc("ann"), self.irc("bob")
        ann.sync()
        bob.send(
            "TOPIC #chat :tea\r\nNICK rob\r\nPART #chat :bye\r\nJOIN #CHAT\r\nQUIT :gone\r\nPRIVMSG #chat :never\r\n"
        )
        self.assertEqual(
            [ann.line() for _ in range(5)],
            [
                ":bob!bob@localhost TOPIC #chat :tea",
                ":bob!bob@localhost NICK rob",
                ":rob!bob@localhost PART #chat :bye",
                ":rob!bob@localhost JOIN #chat",
                ":rob!bob@localhost QUIT gone",
            ],
        )
        self.assertEqual(ann.sync(), [])
        self.assertEqual(bob.rest()[-1], ":chat.local ERROR Goodbye")
        self.assertIn(":chat.local 332 rob #chat :tea", bob.seen)

    def test_who_shares_two_channels_sees_a_quit_once(self) -> None:
        ann, bob = self.irc("ann"), self.irc("bob")
        ann.send("JOIN #tea\r\n")
        ann.sync()
        bob.send("JOIN #tea\r\nNICK rob\r\nQUIT\r\n")
        ann.until("rob!bob@localhost QUIT")
        self.assertEqual(len([line for line in ann.seen if " NICK rob" in line]), 1)
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
        ann, bob = self.irc("ann"), self.irc("bob")
        ann.sync()
        room = chat.LINE_BYTES - len(":bob!bob@localhost PRIVMSG #chat :\r\n")
        texts = ["x" * (room - 2) + "\u00e9", "x" * (room - 1) + "\u00e9", "after"]
        bob.send("".join(f"PRIVMSG #chat :{text}\r\n" for text in texts))
        self.assertEqual(len((ann.line() or "").encode()) + 2, chat.LINE_BYTES)
        self.assertEqual(ann.line(), ":bob!bob@localhost PRIVMSG #chat :after")
        self.assertIn(" 417 bob ", bob.line() or "")

    def test_no_answer_is_longer_than_a_line(self) -> None:
        ann = self.irc("ann")
        heads = "|PING |PART #|WHOIS |CAP REQ :|CAP |JOIN #|NICK |NAMES #|WHO |ISON |WHO #chat %t,|PRIVMSG |MODE "
        for head in (heads + "|MODE #chat |USERHOST |WHOWAS ").split("|"):
            ann.send(head + "x" * (chat.LINE_BYTES - 2 - len(head)) + "\r\n")
        for line in ann.sync():
            self.assertLessEqual(len(line.encode()) + 2, chat.LINE_BYTES, line)

    def test_a_target_named_twice_gets_one_copy(self) -> None:
        ann, bob = self.irc("ann"), self.irc("bob")
        ann.sync()
        bob.send("PRIVMSG #chat,#chat :x\r\n")
        bob.sync()
        self.assertEqual(ann.sync(), [":bob!bob@localhost PRIVMSG #chat :x"])

    def test_no_prompt_for_who_has_begun_to_speak(self) -> None:
        with mock.patch.object(chat, "PROMPT_S", 0.2):
            slow, quiet = self.peer("CAP LS 3"), self.peer()
            self.assertEqual(quiet.sock.recv(100), b"Enter your name: ")
            slow.send("02\r\n")
            self.assertRegex(slow.line() or "", "^:chat.local CAP ")

    def test_bad_bytes_and_endless_lines(self) -> None:
        ann, bob = self.irc("ann"), self.irc("bob")
        ann.sync()
        bob.sock.sendall(b"PRIVMSG #chat :\xff\r\nPRIVMSG #chat :a\rb\r\nPRIVMSG #chat :a\0b\r\n" + b"\n" * 10000)
        for text in (chat.FAIL_INVALID_UTF8.text, chat.FAIL_BAD_CHARACTER.text, chat.FAIL_BAD_CHARACTER.text):
            self.assertEqual(bob.line(), f":chat.local NOTICE * :{text}")
        bob.sock.sendall(b"x" * (1 << 20))
        bob.until(" 417 ")
        bob.send("\r\nPRIVMSG #chat :still here\r\n@" + "a" * 4096 + " PRIVMSG #chat :x\r\n")
        bob.until(" 417 ")
        self.assertEqual(ann.sync(), [":bob!bob@localhost PRIVMSG #chat :still here"])

    def test_reset_in_mid_line_shows_one_leave(self) -> None:
        ann, bob = self.irc("ann"), self.irc("bob")
        ann.sync()
        bob.send("PRIVMSG #chat :half a li")
        bob.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        bob.close()
        self.assertIn(" QUIT ", ann.until("bob"))
        self.assertEqual(ann.sync(), [])


class Identity(ServerCase):
    def test_exactly_one_of_many_gets_a_name(self) -> None:
        peers = [self.peer() for _ in range(20)]
        gate = threading.Barrier(len(peers))
        answers: List[Optional[str]] = []

        def ask(peer: Peer) -> None:
            gate.wait(PATIENCE)
            peer.send("bob\n")
            answers.append(peer.line())

        threads = [threading.Thread(target=ask, args=(peer,)) for peer in peers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(answers.count("*** bob joined (1 here)"), 1)
        self.assertEqual(answers.count("*** Error: that name is taken; send another"), 19)

    def test_a_name_is_free_after_its_holder_left(self) -> None:
        self.plain("bob").close()
        self.eventually(lambda: "bob" not in self.server.hub.nicks, "bob's name was not freed")
        self.plain("bob")

    def test_a_ghost_loses_its_name_when_somebody_asks(self) -> None:
        ghost = self.irc("bob")
        with mock.patch.object(chat, "PROBE_S", 0.1):
            time.sleep(0.15)  # the ghost must have been silent for PROBE_S
            late = self.peer("NICK bob\r\n")
            late.until(" 433 ")
            ghost.until("PING")
            self.eventually(lambda: "bob" not in self.server.hub.nicks, "the ghost kept its name")
        self.assertEqual(ghost.rest(), [":chat.local ERROR :Ping timeout"])

    def test_who_answers_is_no_ghost(self) -> None:
        holder = self.irc("bob")
        with mock.patch.object(chat, "PROBE_S", 0.3):
            time.sleep(0.35)
            self.peer("NICK bob\r\n").until(" 433 ")
            holder.until("PING")
            holder.send("PONG chat.local\r\n")
            time.sleep(0.6)  # past the probe's deadline
            self.assertEqual(holder.sync(), [])

    def test_name_changes_are_throttled(self) -> None:
        ann, bob = self.irc("ann"), self.irc("bob")
        ann.sync()
        bob.send("".join(f"NICK bob{number}\r\n" for number in range(100)))
        refused = [line for line in bob.sync() if " 438 " in line]
        self.assertEqual(len(refused), 100 - chat.NICK_CHANGES)
        self.assertEqual(len(ann.sync()), chat.NICK_CHANGES)

    def test_channels_are_capped(self) -> None:
        bob = self.irc("bob")
        for start in range(0, 1000, 20):
            bob.send("JOIN " + ",".join(f"#c{number}" for number in range(start, start + 20)) + "\r\n")
        refused = [line for line in bob.sync() if " 405 " in line]
        self.assertEqual(len(refused), 1001 - chat.SESSION_CHANNELS)
        self.assertEqual(len(self.server.hub.channels), chat.SESSION_CHANNELS)

    def test_case_change_of_the_own_name(self) -> None:
        bob = self.irc("bob")
        bob.send("NICK BOB\r\n")
        self.assertEqual(bob.line(), ":bob!bob@localhost NICK BOB")


class Pressure(ServerCase):
    def test_silent_connections_are_closed(self) -> None:
        with mock.patch.object(chat, "REGISTER_S", 0.5), mock.patch.object(chat, "PROMPT_S", 0.1):
            silent = [self.peer() for _ in range(50)]
            for peer in silent:
                self.assertEqual(peer.rest()[-1:], ["Enter your name: *** No name within 0 seconds"])
        self.eventually(lambda: not self.server.hub.sessions, "sessions were left")

    def test_pings_keep_the_living_and_end_the_dead(self) -> None:
        with mock.patch.multiple(chat, PING_S=0.2, PONG_S=0.5, REGISTER_S=0.2):
            dead, alive = self.irc("dead"), self.irc("alive")
            while " QUIT " not in (alive.line() or self.fail("the living was dropped, too")):
                if alive.seen[-1].startswith("PING"):
                    alive.send("PONG chat.local\r\n")
            self.assertEqual(alive.seen[-1], ":dead!dead@localhost QUIT :Ping timeout")
            self.assertEqual(dead.rest()[-1], ":chat.local ERROR :Ping timeout")

    def test_who_does_not_read_is_dropped_and_nobody_else_notices(self) -> None:
        with mock.patch.object(chat, "OUTBOX_BYTES", 1 << 16):
            ann, bob = self.irc("ann"), self.irc("bob")
            stalled = Peer.__new__(Peer)
            stalled.sock, stalled.buffer, stalled.seen = socket.socket(), b"", []
            self.addCleanup(stalled.close)
            stalled.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.sock.connect(("127.0.0.1", self.port))
            stalled.send("NICK mud\r\nUSER mud 0 * :mud\r\nJOIN #chat\r\n")
            ann.until("mud!mud@localhost JOIN")
            writer = threading.Thread(target=self.write, args=(bob, 30000))
            writer.start()
            texts: List[str] = []
            with self.assertLogs("chat", "WARNING"):
                while len(texts) < 30000:
                    line = ann.line() or self.fail("ann was dropped")
                    if "PRIVMSG" in line:
                        texts.append(line.rpartition(" ")[2])
            writer.join(PATIENCE)
            self.assertEqual(texts, [str(number) for number in range(30000)])
            gone = ":mud!mud@localhost QUIT :Reads too slowly"
            if gone not in ann.seen:
                self.assertEqual(ann.until(" QUIT "), gone)
            self.eventually(lambda: "mud" not in self.server.hub.nicks, "its name was not freed")

    def write(self, peer: Peer, count: int) -> None:
        for number in range(count):
            peer.send(f"PRIVMSG #chat :{'x' * 200} {number}\r\n")

    def test_everybody_sees_the_same_order(self) -> None:
        peers = [self.irc(f"u{number}", "echo-message") for number in range(8)]
        for peer in peers:
            peer.sync()
        writers = [threading.Thread(target=self.write, args=(peer, 300)) for peer in peers]
        for writer in writers:
            writer.start()
        seen = []
        for peer in peers:
            got = [peer.until("PRIVMSG") for _ in range(8 * 300)]
            seen.append([(line.partition("!")[0], line.rpartition(" ")[2]) for line in got])
        for writer in writers:
            writer.join(PATIENCE)
        self.assertTrue(all(order == seen[0] for order in seen))
        for number in range(8):
            self.assertEqual([n for who, n in seen[0] if who == f":u{number}"], [str(n) for n in range(300)])

    def test_full_server_says_so(self) -> None:
        self.server.max_clients = 1
        self.plain("ann")
        with self.assertLogs("chat", "WARNING"):
            self.assertEqual(self.peer().rest(), [f"ERROR :{chat.FULL}"])

    def test_threads_that_cannot_be_started(self) -> None:
        self.plain("bob")
        broken = mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread"))
        with broken, self.assertLogs("chat", "WARNING"):
            self.assertEqual(self.peer().rest(), [f"*** {chat.FULL}"])
        self.plain("ann")

    def test_a_socket_that_is_gone_before_it_is_set_up(self) -> None:
        self.plain("bob")
        with mock.patch.object(chat, "prepare", side_effect=OSError(22, "Invalid argument")):
            self.assertEqual(self.peer().rest(), [])
        self.plain("ann")

    def test_everything_is_given_back(self) -> None:
        self.plain("first").close()
        self.eventually(lambda: not self.server.hub.sessions, "a session was left")
        before = threading.active_count()
        for peer in [self.irc(f"u{number}") for number in range(50)]:
            peer.close()
        self.eventually(lambda: not self.server._mailer._connections, "connections were left")
        self.eventually(lambda: threading.active_count() <= before, "threads were left")
        self.assertEqual((self.server.hub.nicks, self.server.hub.channels), ({}, {}))

    def test_shutdown_tells_everybody(self) -> None:
        ann, bot, eve = self.plain("ann"), self.peer('{"type":"join","user":"bot"}\n'), self.irc("eve")
        self.server.stop()
        self.assertEqual(ann.rest()[-1], "*** Server is shutting down")
        self.assertEqual(json.loads(bot.rest()[-1])["text"], "*** Server is shutting down")
        self.assertEqual(eve.rest()[-1], ":chat.local ERROR :Server is shutting down")

    def test_a_defect_ends_one_connection_only(self) -> None:
        ann, bob = self.plain("ann"), self.plain("bob")
        broken = chat.Command(lambda hub, session, message: 1 // 0, 0, True)  # type: ignore[arg-type]
        with mock.patch.dict(chat.COMMANDS, NAMES=broken), self.assertLogs("chat", "ERROR"):
            bob.send("/who\n")
            self.assertEqual(bob.rest(), [])
        ann.until("*** bob left: Internal error")


class Fuzz(ServerCase):
    """Generated garbage at every dialect; the seed of a failure is in its name."""

    WORDS = """NICK USER JOIN PART PRIVMSG TOPIC WHO WHOIS MODE CAP LS REQ END NOTICE TAGMSG PING LIST AWAY ISON
        USERHOST NAMES HELP GUEST #chat #a,#b : :: @a=b \x01ACTION %tcuihsnfdlaor,1 * 0 u1 - +b \u202e {} %s {0}
        /nick /msg // exit {"type": "chat"} \u3164"""

    def soup(self, rng: random.Random) -> bytes:
        if rng.random() < 0.2:
            return bytes(rng.randrange(256) for _ in range(rng.randint(0, 60)))
        return " ".join(rng.choices([*self.WORDS.split(), "", "x" * 600], k=rng.randint(1, 6))).encode()

    def test_decoders_refuse_or_understand(self) -> None:
        views = [chat.PLAIN, chat.JSON, chat.HTTP, chat.irc(frozenset(chat.CAPABILITIES))]
        for seed in range(20000):
            rng = random.Random(seed)
            line, view = self.soup(rng).replace(b"\n", b""), rng.choice(views)
            with self.subTest(seed=seed):
                try:
                    messages = view.decode(line, rng.random() < 0.5)
                except chat.Refused:
                    continue
                for message in messages:
                    for out in views:
                        self.assertLessEqual(out.encode(message._replace(source="a!b@c")).count(b"\n"), 5)

    def test_a_server_under_garbage(self) -> None:
        ann = self.irc("ann")
        starts = [b"", b"NICK u1\r\nUSER u 0 * :u\r\nJOIN #chat\r\n", b"u1\n", b'{"type":"join","user":"u1"}\n']
        with self.assertNoErrors():
            for seed in range(200):
                rng = random.Random(seed)
                peer = self.peer()
                with contextlib.suppress(OSError):
                    peer.sock.sendall(rng.choice(starts) + b"\n".join(self.soup(rng) for _ in range(30)) + b"\nexit\n")
                peer.close()
            ann.send("PRIVMSG #chat :x\r\n")
            ann.sync()

    def assertNoErrors(self) -> Any:  # assertNoLogs came with Python 3.10
        case = self

        class Watch:
            def __enter__(self) -> None:
                self.patch = mock.patch.object(chat.log, "exception")
                self.spy = self.patch.start()

            def __exit__(self, *exc: object) -> None:
                case.eventually(lambda: len(case.server.hub.sessions) <= 1, "sessions were left")
                self.patch.stop()
                case.assertEqual(self.spy.call_args_list, [])

        return Watch()


class ProgramCase(unittest.TestCase):
    """Whole programs as a user starts them."""

    def start(self, *args: str, stdin: Any = subprocess.DEVNULL, **more: Any) -> subprocess.Popen[str]:
        command = [sys.executable, str(HERE / "chat.py"), *args]
        program = subprocess.Popen(
            command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", **more
        )
        self.addCleanup(self.end, program)
        return program

    def end(self, program: subprocess.Popen[str]) -> None:
        if program.poll() is None:
            program.kill()
        program.communicate(timeout=PATIENCE)

    def server(self, *args: str, **more: Any) -> Tuple[subprocess.Popen[str], int]:
        program = self.start("server", "--port", "0", *args, **more)
        assert program.stdout
        first = program.stdout.readline()
        self.assertRegex(first, r"^listening on 127\.0\.0\.1:\d+$")
        return program, int(first.rpartition(":")[2])

    def run_client(self, port: int, text: str = "", *args: str) -> Tuple[int, str, str]:
        program = self.start("client", "--port", str(port), *args, stdin=subprocess.PIPE)
        out, err = program.communicate(text, timeout=PATIENCE)
        return program.returncode, out, err


class ServerProgram(ProgramCase):
    def test_server_tells_how_to_join_and_stops_on_sigterm(self) -> None:
        program, port = self.server()
        peer = Peer(port, "ann\n")
        self.addCleanup(peer.close)
        peer.until("joined")
        program.send_signal(signal.SIGTERM)
        self.assertEqual(peer.rest()[-1], "*** Server is shutting down")
        peer.close()
        assert program.stdout and program.stderr
        out, err = program.stdout.read(), program.stderr.read()
        self.assertEqual((program.wait(PATIENCE), err), (0, ""))
        self.assertIn("only this machine can join; --host 0.0.0.0 opens the chat to the network", out)
        self.assertIn(f"nc 127.0.0.1 {port}\n", out)

    def test_port_taken(self) -> None:
        _, port = self.server()
        second = self.start("server", "--port", str(port))
        out, err = second.communicate(timeout=PATIENCE)
        message = f"chat.py: port {port} is taken; choose another with --port, or any with --port 0\n"
        self.assertEqual((second.returncode, out, err), (1, "", message))

    def test_wrong_usage(self) -> None:
        for args in (
            (),
            ("dance",),
            ("server", "--port", "x"),
            ("server", "--port", "70000"),
            ("server", "--max-clients", "0"),
        ):
            program = self.start(*args)
            _, err = program.communicate(timeout=PATIENCE)
            self.assertEqual(program.returncode, 2)
            self.assertTrue(err.startswith("usage:"), err)

    @unittest.skipUnless(hasattr(os, "fork"), "needs ulimit")
    def test_out_of_descriptors(self) -> None:
        import resource

        program, port = self.server(
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)),
        )
        peers = [Peer(port) for _ in range(60)]
        for peer in peers:
            self.addCleanup(peer.close)
        refused = [peer for peer in peers[-10:] if peer.line() == f"ERROR :{chat.FULL}"]
        self.assertEqual(len(refused), 10)
        for peer in peers:
            peer.close()
        end = time.monotonic() + PATIENCE
        while True:
            late = Peer(port, "ann\n")
            self.addCleanup(late.close)
            if late.line() == "*** ann joined (1 here)":
                break
            self.assertLess(time.monotonic(), end, "the server did not recover")
        program.terminate()
        _, err = program.communicate(timeout=PATIENCE)
        self.assertEqual(program.returncode, 0)
        self.assertNotIn("Traceback", err)

    @unittest.skipUnless(shutil.which("nc"), "needs nc")
    def test_printf_into_nc(self) -> None:
        _, port = self.server()
        ann = Peer(port, "ann\n")
        self.addCleanup(ann.close)
        ann.until("joined")
        subprocess.run(
            ["nc", "-N", "127.0.0.1", str(port)],
            input=b"bob\nhello",
            stdout=subprocess.DEVNULL,
            timeout=PATIENCE,
            check=True,
        )
        ann.until("bob: hello")

    def test_log_file(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "log")
            program, port = self.server("--log", str(path), "-v")
            peer = Peer(port)
            peer.sock.sendall(b"\x16\x03")
            peer.rest()
            peer.close()
            program.terminate()
            program.communicate(timeout=PATIENCE)
            self.assertIn("TLS", path.read_text(encoding="utf-8"))


class ClientProgram(ProgramCase):
    def test_a_pipe_sends_and_confirms_every_line(self) -> None:
        _, port = self.server()
        ann = Peer(port, "ann\n")
        self.addCleanup(ann.close)
        ann.until("joined")
        lines = [f"line {number} /\u00e9" for number in range(500)] + ["/not a command", "x " * 400]
        status, out, err = self.run_client(port, "\n".join(lines), "--name", "ci")
        self.assertEqual((status, err), (0, ""))
        got = list(iter(lambda: ann.until("ci"), "*** ci left"))[1:]
        self.assertEqual(got[:501], [f"ci: {line}" for line in lines[:501]])
        self.assertEqual("".join(line[len("ci: ") :] for line in got[501:]).replace(" ", ""), "x" * 400)
        self.assertEqual(out, "*** ci joined (2 here)\n*** In #chat: @ann ci\n")

    def test_name_taken(self) -> None:
        _, port = self.server()
        bob = Peer(port, "bob\n")
        self.addCleanup(bob.close)
        bob.until("joined")
        status, out, _ = self.run_client(port, "hi\n", "--name", "bob")
        self.assertEqual(status, 0)
        self.assertEqual(out.splitlines()[0], "*** bob is taken; you are bob2")
        bob.until("bob2: hi")

    def test_one_line_errors(self) -> None:
        for args, text in (
            (["client", "--name", "b\udcff"], "a name is a letter, "),
            (["client", "--channel", "#\udcff"], "a channel is # and "),
            (["client", "--host", "a..b"], "cannot connect to a..b:"),
            (["server", "--host", "a..b"], "cannot listen on a..b:"),
            (["server", "--server-name", "my chat"], "a --server-name is "),
            (["server", "--log", str(HERE / "no" / "such")], "[Errno 2] "),
        ):
            with self.subTest(args):
                program = self.start(*args)
                out, err = program.communicate(timeout=PATIENCE)
                self.assertEqual((program.returncode, out), (1, ""), err)
                self.assertRegex(err, rf"^chat\.py: {re.escape(text)}[^\n]*\n$")

    def test_a_pipe_without_input_or_with_odd_bytes(self) -> None:
        _, port = self.server()
        ann = Peer(port, "ann\n")
        self.addCleanup(ann.close)
        ann.until("joined")
        self.assertEqual(self.run_client(port, "10%\r20%\nnext\0\n", "--name", "ci")[0], 0)
        self.assertEqual([ann.until("ci:") for _ in range(2)], ["ci: 10% 20%", "ci: next "])
        self.assertEqual(self.run_client(port, "", "--name", "ci")[0], 0)
        command = f'exec "{sys.executable}" "{HERE / "chat.py"}" client --port {port} --name nobody <&-'
        if os.name == "posix":
            subprocess.run(["sh", "-c", command], stdout=subprocess.DEVNULL, timeout=PATIENCE, check=True)

    def test_what_a_strange_server_sends_is_shown_or_ignored(self) -> None:
        fake = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(fake.close)
        client = self.start("client", "--port", str(fake.getsockname()[1]), "--name", "bob", stdin=subprocess.PIPE)
        sock, _ = fake.accept()
        with sock:
            sock.sendall(
                b":x LINE foo\r\nMESSAGE x\r\n:x ECHO\r\nCLOSED\r\nJOIN\r\n:bob!b@h PRIVMSG\r\nPING\r\n353\r\n\xff\r\n"
                b":s 001 bo\x1b[31mb\r\n:a!b@c PRIVMSG #chat :\x1b]0;x\x07\r\n:s 999 x :y\r\n"
                + b"x" * 20000
                + b"\r\nERROR :bye\r\n"
            )
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
        out, err = client.communicate(timeout=PATIENCE)
        self.assertRegex(err, r"^chat\.py: the connection to \S+ was lost\n$")
        shown = "***  joined\n*** In : \n*** bob is taken; you are bo\\x1b[31mb\na: \\x1b]0;x\\x07\n*** bye\n"
        self.assertEqual(out, shown)

    def test_client_without_a_server(self) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            status, out, err = self.run_client(port)
        self.assertEqual((status, out), (1, ""))
        self.assertRegex(err, rf"^chat\.py: cannot connect to 127\.0\.0\.1:{port}: .*\n$")

    def test_client_whose_server_ends(self) -> None:
        server, port = self.server()
        client = self.start("client", "--port", str(port), "--name", "bob", stdin=subprocess.PIPE)
        assert client.stdout
        self.assertEqual(client.stdout.readline(), "*** bob joined (1 here)\n")
        server.send_signal(signal.SIGINT)
        assert client.stderr
        out, err = client.stdout.read(), client.stderr.read()
        self.assertEqual(client.wait(PATIENCE), 1)
        self.assertTrue(out.endswith("*** Server is shutting down\n"), out)
        self.assertEqual(err, f"chat.py: the connection to 127.0.0.1:{port} was lost\n")

    def test_client_interrupted(self) -> None:
        _, port = self.server()
        client = self.start("client", "--port", str(port), "--name", "bob", stdin=subprocess.PIPE)
        assert client.stdout
        client.stdout.readline()
        client.send_signal(signal.SIGINT)
        _, err = client.communicate(timeout=PATIENCE)
        self.assertEqual((client.returncode, err), (130, ""))

    def test_refused_line_is_not_called_delivered(self) -> None:
        fake = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(fake.close)
        port = fake.getsockname()[1]
        client = self.start("client", "--port", str(port), "--name", "bob", stdin=subprocess.PIPE)
        sock, _ = fake.accept()
        with sock, sock.makefile("rwb", 0) as stream:
            answers = {b"CAP LS": b":s CAP * LS :echo-message\r\n", b"CAP REQ": b":s CAP * ACK :echo-message\r\n",
                       b"CAP END": b":s 001 bob :hi\r\n", b"JOIN": b":bob!b@h JOIN #chat\r\n",
                       b"PRIVMSG": b":s 404 bob #chat :Cannot send to channel\r\n"}  # fmt: skip
            assert client.stdin
            client.stdin.write("hello\n")
            client.stdin.close()
            for line in stream:
                for start, answer in answers.items():
                    if line.startswith(start):
                        stream.write(answer)
                if line.startswith(b"PRIVMSG"):
                    break
            client.stdin = None
            out, err = client.communicate(timeout=PATIENCE)
        self.assertEqual((client.returncode, err), (1, "chat.py: a line was not delivered\n"))
        self.assertIn("*** Error: Cannot send to channel\n", out)


if __name__ == "__main__":
    unittest.main()
