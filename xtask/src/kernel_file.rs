//! Refusing a guest kernel that cannot work, before a machine is started for it.

use crate::unpack;
use anyhow::{Context, Result, ensure};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, elf};
use std::fs;
use std::path::Path;

/// Checks that `path` is a kernel that can run as a paravirtualized guest.
///
/// # Errors
/// One line that says what is wrong: no such file, neither bzImage nor ELF, a payload cut short, no Xen notes.
pub fn check(path: &Path) -> Result<()> {
    let inspect = || -> Result<()> {
        let file = fs::read(path).context("cannot be read")?;
        inspect(&unpack::kernel(&file)?)
    };
    inspect().with_context(|| format!("unusable kernel {}", path.display()))
}

fn inspect(image: &[u8]) -> Result<()> {
    let header = elf::FileHeader64::<Endianness>::parse(image)
        .ok()
        .context("the ELF header is damaged")?;
    let endian = header.endian()?;
    ensure!(
        header.e_machine(endian) == elf::EM_X86_64,
        "an ELF file for another kind of processor"
    );
    let segments = header
        .program_headers(endian, image)
        .ok()
        .context("the ELF program headers are cut short")?;
    let mut xen = false;
    for (index, segment) in segments.iter().enumerate() {
        ensure!(
            segment.data(endian, image).is_ok(),
            "the file ends before the end of its segment {index}"
        );
        if let Ok(Some(mut notes)) = segment.notes(endian, image) {
            while let Ok(Some(note)) = notes.next() {
                xen |= note.name() == b"Xen";
            }
        }
    }
    ensure!(
        xen,
        "it has no Xen notes, so it was not built to run as a paravirtualized guest"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(content: &[u8]) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), content).unwrap();
        format!("{:#}", check(file.path()).unwrap_err())
    }

    /// A program of one header that carries one note, called `name`.
    fn kernel(name: &[u8; 4]) -> Vec<u8> {
        let mut file = vec![0; 64 + 56 + 20];
        file[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0");
        file[20] = 1;
        file[32] = 64;
        file[52] = 64;
        file[54] = 56;
        file[56] = 1;
        file[64] = 4;
        file[72] = 120;
        file[96] = 20;
        file[104] = 20;
        file[112] = 4;
        file[120] = 4;
        file[124] = 4;
        file[128] = 6;
        file[132..136].copy_from_slice(name);
        file
    }

    #[test]
    fn a_kernel_with_a_xen_note_is_taken() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), kernel(b"Xen\0")).unwrap();
        check(file.path()).unwrap();
    }

    #[test]
    fn each_kind_of_bad_file_is_named() {
        assert!(
            format!("{:#}", check(Path::new("no/such/file")).unwrap_err()).contains("no/such/file")
        );
        assert!(refusal(b"#!/bin/sh\n").contains("neither a bzImage nor an ELF file"));
        assert!(refusal(b"\x7fELF").contains("ELF header"));
        assert!(refusal(&kernel(b"GNU\0")).contains("no Xen notes"));
        let whole = kernel(b"Xen\0");
        assert!(refusal(&whole[..whole.len() - 1]).contains("segment 0"));
    }
}
