//! Lines a person may type.

use toolstack::command::Command;

#[test]
fn lines_are_understood_by_their_words() {
    let parse = |line| Command::parse(line).unwrap();
    assert_eq!(parse(""), None);
    assert_eq!(parse("  \t "), None);
    assert_eq!(parse(" list "), Some(Command::List));
    assert_eq!(parse("console  web"), Some(Command::Console("web".into())));
    assert_eq!(parse("destroy web"), Some(Command::Destroy("web".into())));
    assert_eq!(parse("help"), Some(Command::Help));
    assert_eq!(parse("quit"), Some(Command::Quit));
}

#[test]
fn what_is_not_understood_is_said_without_control_characters() {
    for (line, part) in [
        ("lst", "lst: unknown command"),
        ("list web", "takes no name"),
        ("console", "which guest"),
        ("destroy", "which guest"),
        ("console a b", "too many words"),
        ("\x1b[2J", "\\u{1b}[2J: unknown"),
    ] {
        let why = Command::parse(line).unwrap_err();
        assert!(why.contains(part), "{line:?}: {why}");
        assert!(!why.contains(char::is_control), "{why:?}");
    }
}
