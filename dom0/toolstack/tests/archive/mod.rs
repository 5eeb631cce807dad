//! Archives as xtask writes them.

/// An archive of these entries.
pub(crate) fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, data) in entries.iter().chain(&[("TRAILER!!!", b"".as_slice())]) {
        out.extend_from_slice(b"070701");
        let mut fields = [0; 13];
        (fields[1], fields[4], fields[6], fields[11]) = (0o100_644, 1, data.len(), name.len() + 1);
        fields.iter().for_each(|field| out.extend_from_slice(format!("{field:08x}").as_bytes()));
        out.extend_from_slice(name.as_bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}
