//! The description of a disk in a guest's file: a text in xl's syntax.
//!
//! ```text
//! TARGET,FORMAT,VDEV,ACCESS[,KEY=VALUE...]        "disk.img,raw,xvda,w"  "bundle:base,,xvda,r"
//! KEY=VALUE,...[,target=TARGET]                   "vdev=xvdb,format=qcow2,access=r,target=/images/b.qcow2"
//! ```
//!
//! | target | meaning |
//! | --- | --- |
//! | a path | a file of the host, which becomes a disk of the emulated machine; only in a file for `xtask` |
//! | `serial:NUMBER` | the disk of the machine with this serial number |
//! | `bundle:NAME` | a file of the boot bundle, read-only |
//! | `memory:SIZE` | empty memory, which is lost with the guest |
//!
//! `format` is `raw` (the default) or `qcow2` (only for a path). `vdev` is `xvda` to `xvdzz`, optionally with a partition
//! number. `access` is `r`, `w` (the default) or `!`, which writes even if another guest has the disk. These keys are not xl's:
//! `part=N` for one partition of the target; `overlay=SIZE` to keep in memory what the guest writes; `rate=SIZE`, a limit in
//! bytes per second; `iops=N`, a limit in requests per second; and `late=SECONDS`, after which a device that does not answer is
//! reset. A SIZE is a number, optionally followed by K, M or G.

use alloc::format;
use alloc::string::{String, ToString};
use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};

/// The maximum number of bytes of a description.
const MAX_TEXT: usize = 1024;
/// The maximum number of bytes of a disk in memory or of an overlay. The memory of the machine sets a lower limit.
const MAX_SIZE: u64 = 1 << 40;

/// What a disk is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A file of the host.
    File(String),
    /// A disk of the machine, by its serial number.
    Serial(String),
    /// A file of the boot bundle.
    Bundle(String),
    /// Memory of this many bytes.
    Memory(u64),
}

/// The format of a file of the host. It makes no difference to guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The sectors one after the other.
    Raw,
    /// QEMU's format qcow2.
    Qcow2,
}

/// Whether the guest may write the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskAccess {
    /// The guest only reads.
    Read,
    /// The guest reads and writes. Other guests may not have the disk.
    Write,
    /// The guest reads and writes, even if other guests have the disk.
    Anyway,
}

/// The name of a disk in its guest, like `xvda`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vdev {
    name: String,
    number: u32,
}

impl Vdev {
    /// Returns the name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the number of the device in the store (ABI io 3.8).
    #[must_use]
    pub const fn number(&self) -> u32 {
        self.number
    }
}

impl FromStr for Vdev {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, &'static str> {
        const RULE: &str = "a vdev is xvda to xvdzz, with a partition from 1 to 15 perhaps";
        let rest = name.strip_prefix("xvd").ok_or(RULE)?;
        let letters = rest.trim_end_matches(|c: char| c.is_ascii_digit());
        let digits = rest.get(letters.len()..).unwrap_or_default();
        if !(1..=2).contains(&letters.len()) || !letters.bytes().all(|letter| letter.is_ascii_lowercase()) {
            return Err(RULE);
        }
        // Disks a to z have the numbers 0 to 25; aa to zz follow.
        let disk = letters.bytes().fold(0, |disk, letter| disk * 26 + u32::from(letter - b'a') + 1) - 1;
        let partition = match digits {
            "" => 0,
            _ if digits.starts_with('0') => return Err(RULE),
            _ => digits.parse().ok().filter(|number| (1..16).contains(number)).ok_or(RULE)?,
        };
        let number = if disk < 16 { 202 << 8 | disk << 4 | partition } else { 1 << 28 | disk << 8 | partition };
        Ok(Self { name: name.to_string(), number })
    }
}

/// A disk of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct DiskConfig {
    /// What the disk is made of.
    pub target: Target,
    /// The format of the target.
    pub format: Format,
    /// The disk's name in the guest.
    pub vdev: Vdev,
    /// Whether the guest may write.
    pub access: DiskAccess,
    /// The number of a partition of the target. `None` for the whole target.
    pub part: Option<u32>,
    /// The maximum number of bytes of memory for what the guest writes. `None`: writes go to the target.
    pub overlay: Option<u64>,
    /// The maximum number of bytes per second. `None`: no limit.
    pub rate: Option<u64>,
    /// The maximum number of requests per second. `None`: no limit.
    pub iops: Option<u64>,
    /// Seconds after which a device that does not answer is reset. `None`: never.
    pub late: Option<u64>,
}

impl DiskConfig {
    /// Returns whether the guest's writes go to the target itself.
    #[must_use]
    pub fn writes_target(&self) -> bool {
        self.access != DiskAccess::Read && self.overlay.is_none()
    }
}

/// The values of a description, as far as they are parsed.
#[derive(Default)]
struct Parts<'a> {
    values: [Option<&'a str>; KEYS.len()],
}

/// All keys. The first four values may be given without their keys, in this order.
const KEYS: [&str; 9] = ["target", "format", "vdev", "access", "part", "overlay", "rate", "iops", "late"];
const POSITIONAL: usize = 4;

impl<'a> Parts<'a> {
    fn read(text: &'a str) -> Result<Self, String> {
        let mut parts = Self::default();
        let (mut rest, mut place) = (text, Some(0));
        while !rest.is_empty() {
            let (part, after) = rest.split_once(',').unwrap_or((rest, ""));
            let part = part.trim();
            let named = part.split_once('=').filter(|(key, _)| key.bytes().all(|c| c.is_ascii_lowercase()));
            match (named, place) {
                // The key `target` comes last, so its value may contain commas.
                (Some(("target", _)), _) => {
                    let target = rest.trim_start().get("target=".len()..).unwrap_or_default();
                    return parts.set("target", target).map(|()| parts);
                }
                (Some((key, value)), _) => {
                    place = None;
                    parts.set(key, value.trim())?;
                }
                (None, Some(number)) => {
                    let key = KEYS.get(number).filter(|_| number < POSITIONAL).ok_or_else(|| surplus(part))?;
                    if !part.is_empty() {
                        parts.set(key, part)?;
                    }
                    place = Some(number + 1);
                }
                (None, None) => return Err(surplus(part)),
            }
            rest = after;
        }
        Ok(parts)
    }

    fn set(&mut self, key: &str, value: &'a str) -> Result<(), String> {
        let place = KEYS.iter().position(|name| *name == key).and_then(|number| self.values.get_mut(number));
        let place = place.ok_or_else(|| format!("`{key}` is no key of a disk; there are {}", KEYS.join(", ")))?;
        match place.replace(value) {
            None => Ok(()),
            Some(_) => Err(format!("`{key}` is given twice")),
        }
    }

    fn get(&self, key: &str) -> Option<&'a str> {
        KEYS.iter().zip(&self.values).find(|(name, _)| **name == key).and_then(|(_, value)| *value)
    }

    fn number(&self, key: &str, most: u64, read: fn(&str) -> Option<u64>) -> Result<Option<u64>, String> {
        let good = |value: &str| read(value).filter(|number| (1..=most).contains(number));
        let wrong = |value: &str| format!("`{key}={value}`: a number from 1 on, and at most {most}");
        self.get(key).map(|value| good(value).ok_or_else(|| wrong(value))).transpose()
    }
}

fn surplus(part: &str) -> String {
    format!("`{part}` follows what can be given without a key: target,format,vdev,access")
}

/// Parses a size: a number, optionally with K, M or G for 1024, 1024^2 or 1024^3.
fn size(text: &str) -> Option<u64> {
    let (digits, unit) = match text.as_bytes().last()? {
        b'K' | b'k' => (text.get(..text.len() - 1)?, 10),
        b'M' | b'm' => (text.get(..text.len() - 1)?, 20),
        b'G' | b'g' => (text.get(..text.len() - 1)?, 30),
        _ => (text, 0),
    };
    plain(digits)?.checked_mul(1 << unit)
}

/// Parses a number that consists of digits alone.
fn plain(digits: &str) -> Option<u64> {
    digits.parse().ok().filter(|_| digits.bytes().all(|digit| digit.is_ascii_digit()))
}

impl Target {
    fn read(text: &str) -> Result<Self, String> {
        let (kind, rest) = text.split_once(':').unwrap_or(("", text));
        match kind {
            "" if text.is_empty() => Err("`target` is missing".into()),
            "serial" | "bundle" if rest.is_empty() => Err(format!("`{text}` names nothing")),
            "serial" if rest.len() > 20 => Err(format!("`{rest}` has more than the 20 bytes of a serial number")),
            "serial" => Ok(Self::Serial(rest.into())),
            "bundle" => Ok(Self::Bundle(rest.into())),
            "memory" => {
                let bytes = size(rest).filter(|bytes| (512..=MAX_SIZE).contains(bytes) && bytes.is_multiple_of(512));
                bytes.map(Self::Memory).ok_or_else(|| format!("`{text}`: a size of whole sectors of 512 bytes"))
            }
            "phy" | "file" | "tap" | "aio" | "qcow2" | "raw" => {
                Err(format!("`{kind}:` is xl's old form: give the path alone, and the format as `format`"))
            }
            _ => Ok(Self::File(text.into())),
        }
    }
}

impl FromStr for DiskConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() > MAX_TEXT || text.contains(char::is_control) {
            return Err(format!("a disk is described in at most {MAX_TEXT} bytes of text"));
        }
        let parts = Parts::read(text)?;
        let target = Target::read(parts.get("target").unwrap_or_default())?;
        let format = match parts.get("format").unwrap_or("raw") {
            "raw" => Format::Raw,
            "qcow2" if matches!(target, Target::File(_)) => Format::Qcow2,
            "qcow2" => return Err("only a file has the format qcow2".into()),
            other => return Err(format!("`{other}` is no format; there are raw, qcow2")),
        };
        let vdev = parts.get("vdev").ok_or("`vdev` is missing")?.parse()?;
        let overlay = parts.number("overlay", MAX_SIZE, size)?;
        let given = parts.get("access");
        // What is in the bundle is not written.
        let default = if matches!(target, Target::Bundle(_)) && overlay.is_none() { "r" } else { "w" };
        let access = match given.unwrap_or(default) {
            "r" | "ro" => DiskAccess::Read,
            "w" | "rw" => DiskAccess::Write,
            "!" | "w!" => DiskAccess::Anyway,
            other => return Err(format!("`{other}` is no access; there are r, w, !")),
        };
        let disk = Self {
            format,
            vdev,
            access,
            part: parts.number("part", 128, plain)?.and_then(|part| u32::try_from(part).ok()),
            overlay,
            rate: parts.number("rate", u64::MAX, size)?,
            iops: parts.number("iops", u64::MAX, plain)?,
            late: parts.number("late", 86_400, plain)?,
            target,
        };
        if disk.writes_target() && matches!(disk.target, Target::Bundle(_)) {
            return Err("a file of the bundle is only read, unless there is an overlay".into());
        }
        if disk.overlay.is_some() && disk.access == DiskAccess::Read {
            return Err("an overlay is for what is written, and the access is `r`".into());
        }
        Ok(disk)
    }
}

impl TryFrom<String> for DiskConfig {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DiskConfig> for String {
    fn from(disk: DiskConfig) -> Self {
        disk.to_string()
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.write_str(path),
            Self::Serial(number) => write!(f, "serial:{number}"),
            Self::Bundle(name) => write!(f, "bundle:{name}"),
            Self::Memory(bytes) => write!(f, "memory:{bytes}"),
        }
    }
}

/// Writes the form that [`DiskConfig::from_str`] reads, by keys, the target last.
impl fmt::Display for DiskConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let format = match self.format {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        };
        let access = match self.access {
            DiskAccess::Read => "r",
            DiskAccess::Write => "w",
            DiskAccess::Anyway => "!",
        };
        write!(f, "vdev={},format={format},access={access}", self.vdev.name)?;
        let options = [
            ("part", self.part.map(u64::from)),
            ("overlay", self.overlay),
            ("rate", self.rate),
            ("iops", self.iops),
            ("late", self.late),
        ];
        for (key, value) in options {
            if let Some(value) = value {
                write!(f, ",{key}={value}")?;
            }
        }
        write!(f, ",target={}", self.target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<DiskConfig, String> {
        text.parse()
    }

    fn why(text: &str) -> String {
        read(text).unwrap_err()
    }

    #[test]
    fn the_forms_of_xl_are_read() {
        let short = read("/images/a b.img,raw,xvda,w").unwrap();
        assert_eq!((&short.target, short.vdev.number()), (&Target::File("/images/a b.img".into()), 51712));
        assert_eq!((short.format, short.access, short.part), (Format::Raw, DiskAccess::Write, None));
        assert_eq!(read("vdev=xvda, target=/images/a b.img").unwrap(), short);
        assert_eq!(read("/images/a b.img, , xvda").unwrap(), short);
        let long = read("vdev=xvdb1,format=qcow2,access=ro,target=/a,b=c.qcow2").unwrap();
        assert_eq!((long.target, long.format), (Target::File("/a,b=c.qcow2".into()), Format::Qcow2));
        assert_eq!((long.vdev.number(), long.access), (51729, DiskAccess::Read));
    }

    #[test]
    fn our_own_targets_and_options_are_read() {
        let base = read("bundle:base,,xvda,part=1,overlay=64M,rate=10m,iops=200,late=60").unwrap();
        assert_eq!((base.target, base.access), (Target::Bundle("base".into()), DiskAccess::Write));
        assert_eq!((base.part, base.overlay, base.rate), (Some(1), Some(64 << 20), Some(10 << 20)));
        assert_eq!((base.iops, base.late), (Some(200), Some(60)));
        assert_eq!(read("bundle:base,,xvda").unwrap().access, DiskAccess::Read);
        assert_eq!(read("memory:1G,,xvdc,!").unwrap().target, Target::Memory(1 << 30));
        assert_eq!(read("serial:abc,,xvdc").unwrap().target, Target::Serial("abc".into()));
    }

    #[test]
    fn what_was_written_is_read_as_the_same() {
        for text in [
            "a.img,raw,xvda,w",
            "vdev=xvdq,access=r,target=a,b.img",
            "bundle:base,,xvda2,w,overlay=1M,part=7,rate=5K,iops=1,late=3",
            "memory:512,,xvdzz,!",
        ] {
            let disk = read(text).unwrap();
            assert_eq!(read(&disk.to_string()), Ok(disk.clone()), "{text}: {disk}");
        }
    }

    #[test]
    fn devices_have_the_numbers_that_linux_expects() {
        for (name, number) in [
            ("xvda", 51712),
            ("xvda15", 51727),
            ("xvdb", 51728),
            ("xvdp", 51952),
            ("xvdq", 1 << 28 | 16 << 8),
            ("xvdaa", 1 << 28 | 26 << 8),
            ("xvdzz3", 1 << 28 | 701 << 8 | 3),
        ] {
            assert_eq!(name.parse::<Vdev>().unwrap().number(), number, "{name}");
        }
        for name in ["", "xvd", "xvd1", "xvda0", "xvda16", "xvda01", "xvdA", "xvdaaa", "sda", "hda", "xvdä"] {
            assert!(name.parse::<Vdev>().is_err(), "{name}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, reason) in [
            ("", "`target` is missing"),
            ("a.img", "`vdev` is missing"),
            ("a.img,vhd,xvda", "`vhd` is no format; there are raw, qcow2"),
            ("a.img,raw,xvda,x", "`x` is no access; there are r, w, !"),
            ("a.img,raw,xvda,w,more", "`more` follows what can be given without a key: target,format,vdev,access"),
            ("vdev=xvda,a.img", "`a.img` follows what can be given without a key: target,format,vdev,access"),
            ("a,raw,xvda,vdev=xvdb", "`vdev` is given twice"),
            ("file:/a,raw,xvda,w", "`file:` is xl's old form: give the path alone, and the format as `format`"),
            ("bundle:a,qcow2,xvda", "only a file has the format qcow2"),
            ("bundle:a,,xvda,w", "a file of the bundle is only read, unless there is an overlay"),
            ("a,,xvda,r,overlay=1M", "an overlay is for what is written, and the access is `r`"),
            ("memory:1000,,xvda", "`memory:1000`: a size of whole sectors of 512 bytes"),
            ("serial:,,xvda", "`serial:` names nothing"),
            ("a,,xvda,iops=0", "`iops=0`: a number from 1 on, and at most 18446744073709551615"),
            ("a,,xvda,part=129", "`part=129`: a number from 1 on, and at most 128"),
        ] {
            assert_eq!(why(text), reason, "{text}");
        }
        let unknown =
            "`cow` is no key of a disk; there are target, format, vdev, access, part, overlay, rate, iops, late";
        assert_eq!(why("a,,xvda,cow=1"), unknown);
        assert!(why("a\nb,,xvda").starts_with("a disk is described"));
    }
}
