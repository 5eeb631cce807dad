//! Files that guests fetch from the host by HTTP.

use anyhow::Result;
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;

/// The host, as guests of QEMU's user network know it.
pub const HOST: &str = "10.0.2.2";

/// Files by their paths: `/data`.
pub type Files = BTreeMap<String, Vec<u8>>;

/// The files in a folder; folders in it are left out.
///
/// # Errors
/// A file cannot be read.
pub fn files(folder: &Path) -> Result<Files> {
    let mut files = Files::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if let (true, Some(name)) = (path.is_file(), path.file_name()) {
            files.insert(format!("/{}", name.to_string_lossy()), fs::read(&path)?);
        }
    }
    Ok(files)
}

/// Serves these files by HTTP at a port of this machine, and returns the port. The server goes on until the tests end.
///
/// # Errors
/// This machine has no free port.
pub fn serve(files: Files) -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    let files = Arc::new(files);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let files = Arc::clone(&files);
            // A client that goes away early is told by what it has received.
            thread::spawn(move || respond(stream, &files));
        }
    });
    Ok(port)
}

fn respond(mut stream: TcpStream, files: &Files) -> std::io::Result<()> {
    let mut request = String::new();
    for line in BufReader::new(stream.try_clone()?).lines() {
        let line = line?;
        if line.is_empty() {
            break;
        }
        if request.is_empty() {
            request = line;
        }
    }
    // apt names a file of a folder that is an archive by itself `/./NAME`.
    let path = request.split(' ').nth(1).unwrap_or_default().replace("/./", "/");
    let (status, content) = match files.get(&path) {
        Some(content) => ("200 OK", content.as_slice()),
        None => ("404 Not Found", [].as_slice()),
    };
    write!(stream, "HTTP/1.0 {status}\r\nContent-Length: {}\r\n\r\n", content.len())?;
    stream.write_all(content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn files_are_served_by_their_paths() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("data"), "some bytes").unwrap();
        fs::create_dir(folder.path().join("folder")).unwrap();
        let files = files(folder.path()).unwrap();
        assert_eq!(files.keys().collect::<Vec<_>>(), ["/data"]);
        let port = serve(files).unwrap();
        let ask = |path: &str| {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
            write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        };
        let good = "HTTP/1.0 200 OK\r\nContent-Length: 10\r\n\r\nsome bytes";
        assert_eq!([ask("/data"), ask("/./data")], [good, good]);
        assert!(ask("/other").starts_with("HTTP/1.0 404 "));
    }
}
