//! Refusing a guest kernel that cannot work, before a machine is started for it.

use anyhow::{Context, Result, anyhow};
use guest_image::Kernel;
use std::borrow::Cow;
use std::fs;
use std::path::Path;

/// No kernel unpacks to more than this many bytes.
pub(crate) const UNPACKED_LIMIT: usize = 256 << 20;

/// Checks that `path` is a kernel that can run as a paravirtualized guest; answers how many bytes unpacking it takes.
///
/// # Errors
/// One line that says what is wrong: no such file, neither bzImage nor ELF, a payload cut short, no Xen notes.
pub fn check(path: &Path) -> Result<u64> {
    let inspect = || -> Result<u64> {
        let file = fs::read(path).context("cannot be read")?;
        Kernel::parse(&unpack(&file)?).map_err(|error| anyhow!("{error}"))?;
        Ok(toolstack::unpack::room_for(&file) as u64)
    };
    inspect().with_context(|| format!("unusable kernel {}", path.display()))
}

/// The ELF file in `image`, a bzImage or already an ELF file.
pub(crate) fn unpack(image: &[u8]) -> Result<Cow<'_, [u8]>> {
    Ok(toolstack::unpack::unpack(image, UNPACKED_LIMIT)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(content: &[u8]) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), content).unwrap();
        format!("{:#}", check(file.path()).unwrap_err())
    }

    #[test]
    fn each_kind_of_bad_file_is_one_line_that_names_it() {
        assert!(format!("{:#}", check(Path::new("no/such/file")).unwrap_err()).contains("no/such/file"));
        for (content, words) in
            [(&b"#!/bin/sh\n"[..], "neither"), (b"\x7fELF", "ELF"), (&test_kernels::cut_bzimage(), "cut off")]
        {
            let refusal = refusal(content);
            assert!(refusal.contains(words), "{words} not in: {refusal}");
            assert!(refusal.starts_with("unusable kernel ") && refusal.lines().count() == 1, "{refusal}");
        }
    }

    /// This test's own program is a sound ELF file, yet no kernel.
    #[test]
    fn a_program_without_xen_notes_is_refused() {
        let refusal = format!("{:#}", check(&std::env::current_exe().unwrap()).unwrap_err());
        assert!(refusal.contains("notes") || refusal.contains("Xen"), "{refusal}");
    }
}
