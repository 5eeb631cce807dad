//! Paths: checked once, from then on a type. No other module looks at the bytes of a path.

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use core::borrow::Borrow;
use core::cmp::Ordering;
use core::fmt;

use crate::domain::DomainId;
use crate::error::StoreError;

/// Longest absolute path in bytes.
pub const ABSOLUTE_MAX: usize = 3072;
/// Longest relative path in bytes.
pub const RELATIVE_MAX: usize = 2048;
/// Special name whose watches fire when a domain is introduced.
pub const INTRODUCE_DOMAIN: &str = "@introduceDomain";
/// Special name whose watches fire when a domain shuts down, dies or is released.
pub const RELEASE_DOMAIN: &str = "@releaseDomain";

const HOMES: &str = "/local/domain/";

/// A valid absolute path, or a special name that starts with `@`. Cloning it or taking an ancestor is cheap: a path and
/// its ancestors share one text.
#[derive(Clone)]
pub struct Path {
    text: Arc<str>,
    /// Length of the path within `text`: up to the end of a component.
    end: usize,
}

/// A path as a client wrote it, and what it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The absolute path.
    pub path: Path,
    /// Whether the path was written relative to the caller's home; events for it are then relative, too.
    pub relative: bool,
}

impl Path {
    fn new(text: impl Into<Arc<str>>) -> Self {
        let text = text.into();
        Self { end: text.len(), text }
    }

    /// The root of the tree.
    #[must_use]
    pub fn root() -> Self {
        Self::new("/")
    }

    /// This path in a text that ends with it. Used for paths that are kept, so that no longer text is kept with them.
    #[must_use]
    pub(crate) fn compact(self) -> Self {
        if self.end == self.text.len() { self } else { Self::new(self.as_str()) }
    }

    /// The directory from which relative paths of this domain start.
    #[must_use]
    pub fn home(domain: DomainId) -> Self {
        Self::new(format!("{HOMES}{domain}"))
    }

    /// Checks a path that must name a node. `text` is absolute, or relative to `caller`'s home.
    ///
    /// # Errors
    /// Characters, separators or length violate ABI io 3.2.
    pub fn resolve(text: &[u8], caller: DomainId) -> Result<Resolved, StoreError> {
        let text = core::str::from_utf8(text).map_err(|_| StoreError::Invalid)?;
        if text.starts_with('/') {
            let path = Self::checked(text)?;
            return Ok(Resolved { path, relative: false });
        }
        if text.is_empty() || text.starts_with('@') || text.len() > RELATIVE_MAX {
            return Err(StoreError::Invalid);
        }
        let path = Self::checked(&format!("{HOMES}{caller}/{text}"))?;
        Ok(Resolved { path, relative: true })
    }

    /// Like [`resolve`](Self::resolve), but takes special names too.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve).
    pub fn resolve_special(text: &[u8], caller: DomainId) -> Result<Resolved, StoreError> {
        if text.first() != Some(&b'@') {
            return Self::resolve(text, caller);
        }
        let text = core::str::from_utf8(text).map_err(|_| StoreError::Invalid)?;
        let valid = text.len() > 1 && text.len() <= RELATIVE_MAX && well_formed(text);
        if !valid {
            return Err(StoreError::Invalid);
        }
        Ok(Resolved { path: Self::new(text), relative: false })
    }

    /// The start of the order of paths: less than every valid path.
    pub(crate) fn first() -> Self {
        Self::new("")
    }

    /// A path that the server itself made or checked before.
    pub(crate) fn literal(text: &str) -> Self {
        Self::new(text)
    }

    fn checked(text: &str) -> Result<Self, StoreError> {
        if text == "/" {
            return Ok(Self::root());
        }
        if !text.starts_with('/') || text.len() > ABSOLUTE_MAX || !well_formed(text) {
            return Err(StoreError::Invalid);
        }
        Ok(Self::new(text))
    }

    /// The path as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.text.get(..self.end).unwrap_or_default()
    }

    fn as_bytes(&self) -> &[u8] {
        self.text.as_bytes().get(..self.end).unwrap_or_default()
    }

    /// Whether this is a special name rather than a place in the tree.
    #[must_use]
    pub fn is_special(&self) -> bool {
        self.as_str().starts_with('@')
    }

    /// The directory this path lies in; the root and special names lie in none.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        let end = self.last_slash().filter(|_| self.as_str() != "/")?.max(1);
        Some(Self { text: Arc::clone(&self.text), end })
    }

    fn last_slash(&self) -> Option<usize> {
        self.as_str().bytes().rposition(|byte| byte == b'/')
    }

    /// The last component.
    #[must_use]
    pub fn name(&self) -> &str {
        let begin = self.last_slash().map_or(0, |slash| slash + 1);
        self.as_str().get(begin..).unwrap_or_default()
    }

    /// The path of the child `name`, one level below.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        let base = self.as_base();
        let mut text = String::with_capacity(base.len() + 1 + name.len());
        text.extend([base, "/", name]);
        Self::new(text)
    }

    /// This path, its parent, and so on up to the root.
    pub fn and_ancestors(&self) -> impl Iterator<Item = Self> {
        core::iter::successors(Some(self.clone()), Self::parent)
    }

    /// How many levels below `ancestor` this path lies; 0 if they are equal, `None` if it lies elsewhere.
    #[must_use]
    pub fn levels_below(&self, ancestor: &Self) -> Option<usize> {
        let rest = if self == ancestor { "" } else { self.as_str().strip_prefix(ancestor.as_base())? };
        let is_below = rest.is_empty() || rest.starts_with('/');
        is_below.then(|| rest.bytes().filter(|byte| *byte == b'/').count())
    }

    /// The text that comes before the slash in a path below this one.
    fn as_base(&self) -> &str {
        if self.as_str() == "/" { "" } else { self.as_str() }
    }

    /// The longest path that is both this path or an ancestor of it, and `other` or an ancestor of it. `None` for a
    /// special name and a path without such.
    pub(crate) fn common(&self, other: &Self) -> Option<Self> {
        let (ours, theirs) = (self.as_base(), other.as_base());
        let same = ours.bytes().zip(theirs.bytes()).take_while(|(a, b)| a == b).count();
        let whole = |text: &str| text.len() == same || text.as_bytes().get(same) == Some(&b'/');
        let end = match (whole(ours) && whole(theirs), ours.get(..same)?.rfind('/')) {
            (true, _) if same > 0 => same,
            (_, Some(slash)) => slash.max(1),
            _ if self.is_special() || other.is_special() => return None,
            _ => 1,
        };
        Some(Self { text: Arc::clone(&self.text), end })
    }

    /// The path as a client whose home is that of `home` writes it.
    #[must_use]
    pub fn relative_to(&self, home: DomainId) -> String {
        let prefix = format!("{HOMES}{home}/");
        self.as_str().strip_prefix(prefix.as_str()).unwrap_or(self.as_str()).into()
    }

    /// Length as the path-length quota counts it: only the part below a domain's home.
    #[must_use]
    pub fn quota_length(&self) -> usize {
        let below_home = self.as_str().strip_prefix(HOMES).and_then(|rest| rest.split_once('/'));
        match below_home {
            Some((domain, rest)) if domain.bytes().all(|byte| byte.is_ascii_digit()) => rest.len(),
            _ => self.end,
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl PartialEq for Path {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Eq for Path {}

impl Borrow<str> for Path {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

impl PartialOrd for Path {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Path {
    fn cmp(&self, other: &Self) -> Ordering {
        order(self.as_bytes(), other.as_bytes())
    }
}

/// Compares byte strings without zeros, eight bytes at a time: paths often begin with the same long prefix, and every
/// search in the tree compares paths.
fn order(one: &[u8], other: &[u8]) -> Ordering {
    let (ones, others) = (one.as_chunks::<8>().0, other.as_chunks::<8>().0);
    for (one, other) in ones.iter().zip(others) {
        let (one, other) = (u64::from_be_bytes(*one), u64::from_be_bytes(*other));
        if one != other {
            return one.cmp(&other);
        }
    }
    let same = ones.len().min(others.len()) * 8;
    rest(one, same).cmp(&rest(other, same)).then(one.len().cmp(&other.len()))
}

/// The eight bytes after the first `same` (a multiple of eight) as a big-endian word; missing bytes read as zeros.
fn rest(bytes: &[u8], same: usize) -> u64 {
    if let Some((next, _)) = bytes.get(same..).and_then(<[u8]>::split_first_chunk) {
        return u64::from_be_bytes(*next);
    }
    // Fewer than eight are left: take the last eight of all, and shift out those that belong to the first `same`.
    let missing = (same + 8).saturating_sub(bytes.len());
    match bytes.last_chunk() {
        Some(last) if missing < 8 => u64::from_be_bytes(*last) << (8 * missing),
        _ => bytes
            .get(same..)
            .unwrap_or_default()
            .iter()
            .zip(1..)
            .fold(0, |word, (byte, at)| word | u64::from(*byte) << (64 - 8 * at)),
    }
}

fn well_formed(text: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'/' | b'_' | b'@');
    let mut before = 0;
    let sound = text.bytes().all(|byte| legal(byte) && (byte, core::mem::replace(&mut before, byte)) != (b'/', b'/'));
    sound && before != b'/'
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use alloc::string::String;
    use alloc::vec::Vec;

    const FIVE: DomainId = DomainId(5);

    fn path(text: &str) -> Path {
        Path::resolve(text.as_bytes(), FIVE).unwrap().path
    }

    #[test]
    fn paths_are_in_the_order_of_their_bytes() {
        let mut texts: Vec<String> = Vec::new();
        for length in 0..20 {
            for last in ["", "-", "/a", "a", "b", "_", "Z", "aa", "a/b"] {
                texts.push(format!("/{}{last}", "local/domain/5/device/vbd".get(..length).unwrap()));
            }
        }
        for one in &texts {
            for other in &texts {
                assert_eq!(order(one.as_bytes(), other.as_bytes()), one.cmp(other), "{one} and {other}");
            }
        }
    }

    #[test]
    fn relative_paths_start_at_home() {
        let resolved = Path::resolve(b"device/vbd", FIVE).unwrap();
        assert_eq!(resolved.path.as_str(), "/local/domain/5/device/vbd");
        assert!(resolved.relative);
        assert_eq!(resolved.path.relative_to(FIVE), "device/vbd");
        assert_eq!(path("/a/b").relative_to(FIVE), "/a/b");
    }

    #[test]
    fn malformed_paths_are_refused() {
        let bad: [&[u8]; 14] = [
            b"",
            b"//",
            b"/a/",
            b"/a//b",
            b"a/",
            b"/a b",
            b"/a\0b",
            b"/a.b",
            b"/\xff",
            b"@x",
            b"@",
            b"a//b",
            b"/a\n",
            b"\xc3\xa4",
        ];
        for text in bad {
            assert_eq!(Path::resolve(text, FIVE), Err(StoreError::Invalid), "{text:?}");
        }
        for text in [&b"@"[..], b"@a//b", b"@a/", b"@a b"] {
            assert_eq!(Path::resolve_special(text, FIVE), Err(StoreError::Invalid), "{text:?}");
        }
        assert!(Path::resolve_special(b"@releaseDomain", FIVE).unwrap().path.is_special());
        assert_eq!(path("/").as_str(), "/");
    }

    #[test]
    fn every_length_is_either_taken_or_refused() {
        for length in 1..=4200 {
            let absolute = format!("/{}", "a".repeat(length - 1));
            let taken = Path::resolve(absolute.as_bytes(), FIVE).is_ok();
            assert_eq!(taken, length <= ABSOLUTE_MAX, "absolute {length}");
            let taken = Path::resolve("a".repeat(length).as_bytes(), FIVE).is_ok();
            assert_eq!(taken, length <= RELATIVE_MAX, "relative {length}");
        }
    }

    #[test]
    fn family_relations_hold_at_the_root_too() {
        assert_eq!(path("/").parent(), None);
        assert_eq!(path("/a").parent(), Some(Path::root()));
        assert_eq!(path("/a/b").parent(), Some(path("/a")));
        assert_eq!(Path::root().child("a"), path("/a"));
        assert_eq!(path("/a").child("b"), path("/a/b"));
        assert_eq!((path("/a/b").name(), path("/").name()), ("b", ""));
        let line: alloc::vec::Vec<_> = path("/a/b").and_ancestors().map(|p| p.compact().text).collect();
        assert_eq!(line, ["/a/b".into(), "/a".into(), Arc::<str>::from("/")]);
        assert_eq!(path("/a/b/c").levels_below(&path("/a")), Some(2));
        assert_eq!(path("/a").levels_below(&path("/a")), Some(0));
        assert_eq!(path("/").levels_below(&path("/")), Some(0));
        assert_eq!(path("/a").levels_below(&path("/")), Some(1));
        assert_eq!(path("/ab").levels_below(&path("/a")), None);
        assert_eq!(path("/").levels_below(&path("/a")), None);
    }

    #[test]
    fn what_two_paths_have_in_common_ends_with_a_component() {
        let rows = [
            ("/a/b/c", "/a/b/d", "/a/b"),
            ("/a/b", "/a/b/c", "/a/b"),
            ("/a/b/c", "/a/b", "/a/b"),
            ("/a/bc", "/a/b", "/a"),
            ("/a/b", "/a/bc", "/a"),
            ("/ab", "/a", "/"),
            ("/a", "/b", "/"),
            ("/", "/b", "/"),
            ("/a", "/a", "/a"),
        ];
        for (one, other, both) in rows {
            assert_eq!(path(one).common(&path(other)), Some(path(both)), "{one} {other}");
        }
        let special = |text: &str| Path::literal(text);
        assert_eq!(special("@a").common(&path("/a")), None);
        assert_eq!(special("@a").common(&special("@a")), Some(special("@a")));
        assert_eq!(special("@ab").common(&special("@a")), None);
    }

    #[test]
    fn the_quota_counts_from_the_home() {
        assert_eq!(path("/local/domain/12/abc").quota_length(), 3);
        assert_eq!(path("/local/domain/12").quota_length(), 16);
        assert_eq!(path("/local/domain/x/abc").quota_length(), 19);
        assert_eq!(path("/local/domain").quota_length(), 13);
    }
}
