//! Public keys of ssh, as OpenSSH writes them: `TYPE BASE64 COMMENT`.

use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::Path;

/// The types that OpenSSH knows.
const TYPES: [&str; 7] = [
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
];
/// No file with public keys has so many bytes.
const LARGEST: u64 = 1 << 20;

/// Whether a text has a private key.
pub(crate) fn is_private(text: &str) -> bool {
    text.contains("PRIVATE KEY-----") || text.contains("PuTTY-User-Key-File")
}

/// Reads the public keys in a file: at least one, each in a line.
///
/// # Errors
/// The file cannot be read, has a private key, or a line that is no public key.
pub(crate) fn read(path: &Path) -> Result<Vec<String>> {
    let name = path.display();
    let metadata = fs::metadata(path).with_context(|| format!("{name}: no such file"))?;
    ensure!(metadata.is_file() && metadata.len() <= LARGEST, "{name}: is no file with a public key");
    let text = fs::read(path).with_context(|| format!("{name}: cannot be read"))?;
    let text = String::from_utf8_lossy(&text);
    ensure!(
        !is_private(&text),
        "{name}: is a private key, which must not leave this machine; the public key has a file of its own: {name}.pub"
    );
    let mut keys = Vec::new();
    for (number, line) in text.lines().enumerate() {
        match line.trim() {
            "" => {}
            line if line.starts_with('#') => {}
            line if is_public(line) => keys.push(line.to_owned()),
            _ => bail!("{name}:{}: no public key of OpenSSH", number + 1),
        }
    }
    ensure!(!keys.is_empty(), "{name}: has no public key");
    Ok(keys)
}

/// Whether a line is a public key: its type also stands, behind its length, at the beginning of the key itself.
fn is_public(line: &str) -> bool {
    let mut words = line.split_ascii_whitespace();
    let (Some(kind), Some(key)) = (words.next(), words.next()) else { return false };
    let Some(bytes) = decode(key) else { return false };
    let plain = !line.chars().any(char::is_control);
    let inner = bytes.first_chunk().map(|length: &[u8; 4]| u32::from_be_bytes(*length) as usize);
    plain && TYPES.contains(&kind) && inner == Some(kind.len()) && bytes[4..].starts_with(kind.as_bytes())
}

/// Decodes base64. White space is ignored.
pub(crate) fn decode(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => Some(u32::from(byte - b'A')),
        b'a'..=b'z' => Some(u32::from(byte - b'a') + 26),
        b'0'..=b'9' => Some(u32::from(byte - b'0') + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let data = digits.iter().rposition(|byte| *byte != b'=').map_or(0, |last| last + 1);
    if !digits.len().is_multiple_of(4) || digits.len() - data > 2 {
        return None;
    }
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3);
    for chunk in digits[..data].chunks(4) {
        let number = chunk.iter().try_fold(0, |number, byte| Some(number << 6 | digit(*byte)?))?;
        let padded = number << (6 * (4 - chunk.len()));
        bytes.extend(&padded.to_be_bytes()[1..chunk.len()]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) const KEY: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl me@here";

    #[test]
    fn base64_is_decoded() {
        for (text, bytes) in [
            ("", &b""[..]),
            ("Zg==", b"f"),
            ("Zm8=", b"fo"),
            ("Zm9v", b"foo"),
            ("Zm9v\n YmFy", b"foobar"),
            ("/+8=", b"\xff\xef"),
        ] {
            assert_eq!(decode(text).as_deref(), Some(bytes), "{text}");
        }
        for text in ["Z", "Zg", "Zg=", "Z===", "====", "Zg==Zg==", "Zm9-", "Zm9ö"] {
            assert_eq!(decode(text), None, "{text}");
        }
    }

    #[test]
    fn only_public_keys_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("key");
        let told = |text: &str| {
            fs::write(&file, text).unwrap();
            read(&file).map_err(|why| why.to_string().replace(&file.display().to_string(), "KEY"))
        };
        assert_eq!(told(&format!("# mine\n{KEY}\n\n{KEY}\n")), Ok(vec![KEY.to_owned(); 2]));
        for (text, why) in [
            ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n", "KEY: is a private key"),
            ("PuTTY-User-Key-File-3: ssh-ed25519\n", "KEY: is a private key"),
            ("", "KEY: has no public key"),
            ("ssh-ed25519\n", "KEY:1: no public key of OpenSSH"),
            (&KEY.replace("ed25519", "rsa"), "KEY:1: no public key of OpenSSH"),
            (&KEY.replace("OMqq", "OMq!"), "KEY:1: no public key of OpenSSH"),
            (&format!("{KEY}\n{KEY}\u{7}\n"), "KEY:2: no public key of OpenSSH"),
        ] {
            let refusal = told(text).unwrap_err();
            assert!(refusal.starts_with(why) && refusal.lines().count() == 1, "{text}: {refusal}");
        }
        assert!(read(&folder.path().join("none")).unwrap_err().to_string().ends_with("none: no such file"));
        assert!(read(folder.path()).unwrap_err().to_string().ends_with(": is no file with a public key"));
    }
}
