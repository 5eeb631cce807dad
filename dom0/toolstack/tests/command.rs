//! Lines a person may type.

use toolstack::command::{Command, Completion, Line, VERBS, complete, help, shows_all_consoles};
use toolstack::json::{self, Object};

#[test]
fn lines_are_understood_by_their_words() {
    let parse = |line| Command::parse(line).unwrap().map(|line| line.command);
    let web = || "web".to_string();
    assert_eq!(parse(""), None);
    assert_eq!(parse("  \t "), None);
    assert_eq!(parse(" list "), Some(Command::List { all: false }));
    assert_eq!(parse("list -a"), Some(Command::List { all: true }));
    assert_eq!(parse("console  web"), Some(Command::Console(web())));
    assert_eq!(parse("destroy web"), Some(Command::Destroy(web())));
    assert_eq!(parse("shutdown web"), Some(Command::Shutdown { name: web(), wait: false }));
    assert_eq!(parse("reboot web -w"), Some(Command::Reboot { name: web(), wait: true }));
    assert_eq!(parse("mem-set web 64"), Some(Command::MemSet { name: web(), mib: 64 }));
    assert_eq!(parse("rename web shop"), Some(Command::Rename { name: web(), to: "shop".into() }));
    assert_eq!(parse("uptime"), Some(Command::Uptime(None)));
    assert_eq!(parse("uptime web"), Some(Command::Uptime(Some(web()))));
    assert_eq!(parse("disks"), Some(Command::Disks));
    let disk = || "memory:1M,,xvda,w".parse().unwrap();
    assert_eq!(parse("block-attach web memory:1M,,xvda,w"), Some(Command::BlockAttach { name: web(), disk: disk() }));
    assert_eq!(parse("block-attach web memory:1M, ,xvda"), Some(Command::BlockAttach { name: web(), disk: disk() }));
    let detach = |force| Some(Command::BlockDetach { name: web(), vdev: "xvda".into(), force });
    assert_eq!([parse("block-detach web xvda"), parse("block-detach --force web xvda")], [detach(false), detach(true)]);
    assert_eq!(parse("block-reset abc"), Some(Command::BlockReset("abc".into())));
    assert_eq!(parse("block-list"), Some(Command::BlockList(None)));
    assert_eq!(parse("networks"), Some(Command::Networks));
    let lan = || "bridge=lan,rate=1MB/s".parse().unwrap();
    let attach = |vif| Some(Command::NetworkAttach { name: web(), vif });
    assert_eq!(parse("network-attach web bridge=lan, rate=1MB/s"), attach(lan()));
    assert_eq!(parse("network-attach web"), attach("".parse().unwrap()));
    let detach = |force| Some(Command::NetworkDetach { name: web(), device: "0".into(), force });
    assert_eq!([parse("network-detach web 0"), parse("network-detach --force web 0")], [detach(false), detach(true)]);
    assert_eq!(parse("network-list"), Some(Command::NetworkList(None)));
    assert_eq!(parse("network-list web"), Some(Command::NetworkList(Some(web()))));
    assert_eq!(parse("block-list web"), Some(Command::BlockList(Some(web()))));
    assert_eq!(parse("help"), Some(Command::Help(None)));
    assert_eq!(parse("quit"), Some(Command::Quit));
    assert_eq!(Command::parse("list -j"), Ok(Some(Line { command: Command::List { all: false }, json: true })));
}

#[test]
fn what_is_not_understood_is_said_without_control_characters() {
    for (line, part) in [
        ("lst", "lst: unknown command"),
        ("-j", "-j: unknown command"),
        ("list web", "usage: list"),
        ("disks tenon0", "usage: disks"),
        ("block-attach web", "usage: block-attach NAME DISK"),
        ("block-attach web memory:1M", "block-attach: `vdev` is missing"),
        ("block-attach web serial:\x1b,,xvda", "block-attach: a disk is described"),
        ("block-detach web", "usage: block-detach NAME VDEV [--force]"),
        ("networks nat", "usage: networks"),
        ("network-attach web lan", "network-attach: `lan` is not KEY=VALUE"),
        ("network-detach web", "usage: network-detach NAME DEVICE [--force]"),
        ("block-list --force", "block-list: no option --force"),
        ("list -w", "list: no option -w"),
        ("console", "usage: console NAME"),
        ("destroy", "usage: destroy NAME"),
        ("console a b", "usage: console NAME"),
        ("mem-set a", "usage: mem-set NAME MIB"),
        ("mem-set a 1G", "no number of MiB: 1G"),
        ("mem-set a \x1b", "\\u{1b}"),
        ("help \x1b", "help: no command \\u{1b}"),
        ("\x1b[2J", "\\u{1b}[2J: unknown"),
    ] {
        let why = Command::parse(line).unwrap_err();
        assert!(why.contains(part), "{line:?}: {why}");
        assert!(!why.contains(char::is_control), "{why:?}");
    }
}

/// Every verb is understood with what its help says it takes, and has help of its own.
#[test]
fn every_verb_has_help_and_is_understood() {
    for verb in VERBS {
        let words = verb.takes.replace("[NAME]", "web").replace("[VERB]", "list");
        let words = words.replace("[-a]", "-a").replace("[-w]", "-w").replace("[-c]", "-c");
        let words = words.replace("MIB", "64").replace("[--force]", "--force").replace("DISK", "memory:1M,,xvda");
        let words = words.replace("[VIF]", "bridge=lan").replace("DEVICE", "0");
        let line = format!("{} {words} -j", verb.name);
        assert!(matches!(Command::parse(&line), Ok(Some(Line { json: true, .. }))), "{line}");
        assert_eq!(Command::parse(&format!("help {}", verb.name)).unwrap().unwrap().command, Command::Help(Some(verb)));
        assert!(help().contains(verb.does) && verb.help().contains(verb.does));
    }
}

#[test]
fn verbs_and_names_are_completed() {
    let of = |line: &str| complete(line, ["web", "web-2", "db"].into_iter());
    let add = |add: &str| Completion { add: add.into(), choices: vec![] };
    assert_eq!(of("li"), add("st "));
    assert_eq!(of("pause d"), add("b "));
    assert_eq!(of("shutdown -w d"), add("b "));
    assert_eq!(of("help mem"), add("-set "));
    assert_eq!(of("pause w"), Completion { add: "eb".into(), choices: vec!["web".into(), "web-2".into()] });
    assert_eq!(of("re"), Completion { add: String::new(), choices: vec!["reboot".into(), "rename".into()] });
    assert_eq!(of("list "), Completion::default());
    assert_eq!(of("xyz"), Completion::default());
    assert_eq!(of("pause db w"), Completion::default());
    assert_eq!(of("").choices.len(), VERBS.len());
}

#[test]
fn answers_for_programs_are_json() {
    let object = Object::default().text("na\"me", "a\\b\n\x1b\u{1f600}é").raw("n", 7).end();
    let parsed: serde_json::Value = serde_json::from_str(&object).unwrap();
    assert_eq!(parsed, serde_json::json!({"na\"me": "a\\b\n\x1b\u{1f600}é", "n": 7}));
    assert!(object.bytes().all(|byte| matches!(byte, b' '..=b'~')), "{object}");
    assert_eq!(json::array(["1".to_string(), object].into_iter()).parse::<serde_json::Value>().unwrap()[0], 1);
    assert_eq!(json::array(std::iter::empty()), "[]");
}

#[test]
fn dom0s_command_line_has_one_word() {
    assert_eq!(
        ["", " consoles=all ", "consoles=all consoles=all"].map(shows_all_consoles),
        [Ok(false), Ok(true), Ok(true)]
    );
    assert!(shows_all_consoles("consoles=all quiet").is_err_and(|why| why.contains("consoles=all")));
}
