//! Paths: checked once, then a type. No other module looks at the bytes of a path.

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use core::fmt;

use crate::domain::DomainId;
use crate::error::StoreError;

/// Longest absolute path in bytes.
pub const ABSOLUTE_MAX: usize = 3072;
/// Longest relative path in bytes.
pub const RELATIVE_MAX: usize = 2048;
/// Fired when a domain is introduced.
pub const INTRODUCE_DOMAIN: &str = "@introduceDomain";
/// Fired when a domain shuts down, dies or is released.
pub const RELEASE_DOMAIN: &str = "@releaseDomain";

const HOMES: &str = "/local/domain/";

/// A valid absolute path, or a special name that starts with `@`. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Path(Arc<str>);

/// What a client wrote, and what it means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The absolute path.
    pub path: Path,
    /// Whether it was written relative to the caller's home; events then are, too.
    pub relative: bool,
}

impl Path {
    /// The root of the tree.
    #[must_use]
    pub fn root() -> Self {
        Self("/".into())
    }

    /// The directory relative paths of this domain start from.
    #[must_use]
    pub fn home(domain: DomainId) -> Self {
        Self(format!("{HOMES}{domain}").into())
    }

    /// Checks a path that must name a node: absolute, or relative to `caller`'s home.
    ///
    /// # Errors
    /// Characters, separators or length break the rules of ABI 3.2.
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

    /// As [`resolve`](Self::resolve), and takes special names too.
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
        Ok(Resolved { path: Self(text.into()), relative: false })
    }

    /// A path the server itself writes down.
    pub(crate) fn literal(text: &str) -> Self {
        Self(text.into())
    }

    fn checked(text: &str) -> Result<Self, StoreError> {
        if text == "/" {
            return Ok(Self::root());
        }
        if !text.starts_with('/') || text.len() > ABSOLUTE_MAX || !well_formed(text) {
            return Err(StoreError::Invalid);
        }
        Ok(Self(text.into()))
    }

    /// The path as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is a special name rather than a place in the tree.
    #[must_use]
    pub fn is_special(&self) -> bool {
        self.0.starts_with('@')
    }

    /// The directory this path lies in; the root and special names lie in none.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        match self.0.rsplit_once('/')? {
            ("", "") => None,
            ("", _) => Some(Self::root()),
            (parent, _) => Some(Self(parent.into())),
        }
    }

    /// The last component.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.rsplit_once('/').map_or(&*self.0, |(_, name)| name)
    }

    /// A path one level below.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        let base = if &*self.0 == "/" { "" } else { &*self.0 };
        Self(format!("{base}/{name}").into())
    }

    /// This path, its parent, and so on up to the root.
    pub fn and_ancestors(&self) -> impl Iterator<Item = Self> {
        core::iter::successors(Some(self.clone()), Self::parent)
    }

    /// How many levels below `ancestor` this path lies; `None` when it does not lie below or at it.
    #[must_use]
    pub fn levels_below(&self, ancestor: &Self) -> Option<usize> {
        let base = if &*ancestor.0 == "/" { "" } else { &*ancestor.0 };
        let rest = if self == ancestor { "" } else { self.0.strip_prefix(base)? };
        let is_below = rest.is_empty() || rest.starts_with('/');
        is_below.then(|| rest.bytes().filter(|byte| *byte == b'/').count())
    }

    /// The path as a client with this home wrote it.
    #[must_use]
    pub fn relative_to(&self, home: DomainId) -> String {
        let prefix = format!("{HOMES}{home}/");
        self.0.strip_prefix(prefix.as_str()).unwrap_or(&self.0).into()
    }

    /// Length as the path-length quota counts it: what follows a domain's home.
    #[must_use]
    pub fn quota_length(&self) -> usize {
        let below_home = self.0.strip_prefix(HOMES).and_then(|rest| rest.split_once('/'));
        match below_home {
            Some((domain, rest)) if domain.bytes().all(|byte| byte.is_ascii_digit()) => rest.len(),
            _ => self.0.len(),
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn well_formed(text: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-/_@".contains(&byte);
    text.bytes().all(legal) && !text.ends_with('/') && !text.contains("//")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIVE: DomainId = DomainId(5);

    fn path(text: &str) -> Path {
        Path::resolve(text.as_bytes(), FIVE).unwrap().path
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
        let line: alloc::vec::Vec<_> = path("/a/b").and_ancestors().map(|p| p.0).collect();
        assert_eq!(line, ["/a/b".into(), "/a".into(), Arc::<str>::from("/")]);
        assert_eq!(path("/a/b/c").levels_below(&path("/a")), Some(2));
        assert_eq!(path("/a").levels_below(&path("/a")), Some(0));
        assert_eq!(path("/").levels_below(&path("/")), Some(0));
        assert_eq!(path("/a").levels_below(&path("/")), Some(1));
        assert_eq!(path("/ab").levels_below(&path("/a")), None);
        assert_eq!(path("/").levels_below(&path("/a")), None);
    }

    #[test]
    fn the_quota_counts_from_the_home() {
        assert_eq!(path("/local/domain/12/abc").quota_length(), 3);
        assert_eq!(path("/local/domain/12").quota_length(), 16);
        assert_eq!(path("/local/domain/x/abc").quota_length(), 19);
        assert_eq!(path("/local/domain").quota_length(), 13);
    }
}
